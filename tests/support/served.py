"""`copris serve` processes for tests that need real servers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import psutil

DEADLINE_S = 240
SMALL = [
    *("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27)),
    *("--max-model-len", "257", "--max-num-seqs", "32", "--disable-uvicorn-access-log"),
    *("--stream-interval", "4"),
]


def is_alive(process: psutil.Process) -> bool:
    """A process that ended and that nobody waits for (no init in the container) is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def cores(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that are an engine's core and live."""
    found = []
    for process in processes:
        # It may end between the two looks.
        with contextlib.suppress(psutil.NoSuchProcess):
            if is_alive(process) and "EngineCore" in " ".join(process.cmdline()):
                found.append(process)
    return found


class Served:
    """One server on a free port, in a session of its own."""

    def __init__(self, checkpoint: Path, log: Path, core: int = 0) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.started: list[psutil.Process] = []
        self._checkpoint = checkpoint
        cores = sorted(os.sched_getaffinity(0))
        self._core = cores[core % len(cores)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The server's own process."""
        assert self._process is not None, "it was not started"
        return self._process

    def start(self) -> None:
        """Begin to boot, unless it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "copris_lightning", "serve"]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--model", str(self._checkpoint), "--port", str(self.port), *SMALL],
                # Each server's worker would bind itself to the same core.
                env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(self._core)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)
        server = psutil.Process(self.process.pid)
        self.started = [server, *server.children(recursive=True)]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server's own process, not to its engine's."""
        os.kill(self.process.pid, number)

    def alive(self) -> list[psutil.Process]:
        return [process for process in self.started if is_alive(process)]

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + 60
        while alive := self.alive():
            assert time.monotonic() < deadline, (alive, self.log.read_text()[-3000:])
            time.sleep(0.1)

    def end(self) -> None:
        """As gently as it lets itself be ended: killed at once, it would leave shared memory."""
        if self._process is None:
            return
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
