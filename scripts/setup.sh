#!/usr/bin/env bash
# Makes a virtual environment with this package and the CPU build of vLLM.
#
#   VENV    where; .venv
#   EXTRAS  of pyproject.toml; cpu,dev
#   MORE    further packages, resolved together with these; none
#   PYTHON  which makes it; python3.11
set -euo pipefail
venv=${VENV:-.venv}
python=${PYTHON:-python3.11}
read -ra packages <<<"-e .[${EXTRAS:-cpu,dev}] ${MORE:-}"
command -v "$python" >/dev/null || python=python3

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip install --quiet)
"${pip[@]}" --upgrade pip

# pip's index may not have the CPU build of torch; uv knows where that is.
if ! "${pip[@]}" "${packages[@]}"; then
    echo "pip could not resolve the CPU build; trying uv"
    "${pip[@]}" uv
    "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu "${packages[@]}"
fi

# Builds for another torch fail at import, and transformers imports them if they are there.
for package in torchvision torchaudio torchcodec; do
    if "$venv/bin/python" -m pip show --quiet "$package" 2>/dev/null &&
        ! "$venv/bin/python" -c "import $package" >/dev/null 2>&1; then
        echo "uninstalling $package: it does not match this torch, and nothing needs it"
        "$venv/bin/python" -m pip uninstall --quiet --yes "$package"
    fi
done
"$venv/bin/python" -c "import transformers, vllm, copris_lightning"
