# Two commands do all set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart simulated test test-models test-kills check format clean

setup: $(STAMP)

# The CPU build of vLLM brings torchvision, torchaudio and torchcodec builds that may not match its
# torch, and then `import transformers` fails. Nothing here needs them.
$(STAMP): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $@

quickstart: setup
	$(BIN)/python -m copris_lightning.quickstart.warm_start --output .cache/quickstart
	$(BIN)/copris fit --config configs/quickstart.yaml

simulated: setup
	$(BIN)/python -c "from copris_lightning.quickstart.warm_start import tiny_model; tiny_model('.cache/tiny')"
	$(BIN)/copris fit --config configs/simulated.yaml

test: setup
	$(BIN)/python -m pytest

# Every architecture of docs/models.md on the real engine; half an hour on two cores.
# COPRIS_MODELS=qwen3_moe,mixtral chooses some.
test-models: setup
	COPRIS_MODELS=$(or $(COPRIS_MODELS),all) $(BIN)/python -m pytest tests/test_models.py

# Runs and engines ended by each signal, in each process, in each phase: an engine boot each.
# `make test-kills ARGS="-k sync"` takes a part of it.
test-kills: setup
	$(BIN)/python -m pytest -m kills $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache runs
