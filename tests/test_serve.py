"""`copris serve`: what it starts, and what it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from copris_lightning.__main__ import main


class Replaced(Exception):
    """Instead of another program in this process."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the process was to be replaced by: program, arguments and environment."""
    seen: list[Any] = []

    def execve(*what: Any) -> None:
        seen.extend(what)
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    return seen


def test_it_starts_vllm_with_all_that_the_engine_needs(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPRIS_OWNER", "a-trainer|1|/dev/shm/copris-1-")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(Replaced):
        main(["serve", "--model", "model", "--port", "8001", "--max-model-len", "64"])
    program, arguments, environment = started
    assert program == arguments[0] == sys.executable
    pairs = dict(pairwise(arguments))
    assert pairs["--model"] == str(tmp_path / "model")
    assert pairs["--host"] == "127.0.0.1"
    assert pairs["--port"] == "8001"
    assert pairs["--max-model-len"] == "64"
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--worker-extension-cls"].endswith("vllm_worker.CoprisWorkerExtension")
    assert "--enable-scale-out" in arguments
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "OMP_NUM_THREADS" not in environment
    # The server's engine ends with the server, whatever trainer this was started from.
    assert environment["COPRIS_OWNER"].split("|")[1:] == [str(os.getpid()), ""]


def test_a_name_of_the_hub_is_passed_on(started: list[Any]) -> None:
    with pytest.raises(Replaced):
        main(["serve", "--model", "Qwen/Qwen3-0.6B"])
    assert "Qwen/Qwen3-0.6B" in started[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--model"),
        (["--model", "m", "--logprobs-mode=raw_logprobs"], "--logprobs-mode=raw_logprobs: this is"),
        (["--model", "m", "--worker_extension_cls", "x.Y"], "--worker_extension_cls: this is set"),
    ],
)
def test_options_that_cannot_work_are_refused(
    args: list[str], message: str, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["serve", *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not started


def test_its_help_warns_and_loads_neither_lightning_nor_torch() -> None:
    code = (
        "import sys\nfrom copris_lightning.__main__ import main\n"
        "try: main(['serve', '--help'])\nfinally: print([m for m in ('lightning', 'torch') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0
    assert "trusted networks only" in " ".join(result.stdout.split())
    assert result.stdout.rstrip().endswith("[]")


NEVER = """
import asyncio, sys, uvicorn

async def app(scope, receive, send):
    print("asked", flush=True)
    await asyncio.Event().wait()

config = uvicorn.Config(app, fd=int(sys.argv[1]), lifespan="off", log_level="error")
uvicorn.Server(config).run()
"""
"""A server whose engine died: it never answers."""


def test_a_server_ends_though_it_owes_an_answer(tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text(NEVER)
    start = "from copris_lightning import serve; serve._VLLM = 'never'; serve._become_server()"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = subprocess.Popen(
            [sys.executable, "-c", start, str(listening.fileno())],
            pass_fds=[listening.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            stdout=subprocess.PIPE,
        )
        try:
            with socket.create_connection(listening.getsockname()) as asking:
                asking.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
                assert server.stdout is not None
                assert server.stdout.readline() == b"asked\n"
            server.terminate()
            server.wait(60)  # it would wait for ever
        finally:
            server.kill()
            server.wait()
