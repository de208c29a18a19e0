"""A run of the command in processes of its own, and all that must be gone when it has ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from served import cores, is_alive

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240
_WITH_SIGINT = (
    "import os, signal, sys; signal.signal(signal.SIGINT, getattr(signal, sys.argv[1])); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


def with_sigint(args: Sequence[str], *, ignored: bool = False) -> list[str]:
    """A command that starts with SIGINT at its default, or ignored as by a script's background
    job. Both are inherited: without this, what a test sees would depend on who started it."""
    return [sys.executable, "-c", _WITH_SIGINT, "SIG_IGN" if ignored else "SIG_DFL", *args]


def quickstart(checkpoint: Path, *args: str) -> list[str]:
    """The quickstart's command, on a smaller model and with smaller batches."""
    config = str(ROOT / "configs" / "quickstart.yaml")
    small = {"cap": 16, "batch_groups": 4, "group_size": 2, "max_new_tokens": 64}
    return [
        *(sys.executable, "-m", "copris_lightning", "fit", "--config", config),
        *args,
        *("--model", str(checkpoint)),
        *(part for name, n in small.items() for part in (f"--{name}", str(n))),
    ]


def abandoned() -> set[str]:
    """What lies in shared memory and belongs to no living process; those of other runs that go on
    meanwhile belong to theirs."""
    used: set[int] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            lines = maps.read_text().splitlines()
            used |= {int(line.split()[4]) for line in lines if " /dev/shm/" in line}
    found = set()
    for name in os.listdir("/dev/shm"):
        owner = name.split("-")[1] if name.startswith("copris-") else ""
        with contextlib.suppress(FileNotFoundError):
            about = os.stat(f"/dev/shm/{name}")
            ours = about.st_uid == os.getuid() and about.st_ino not in used
            if ours and not (owner and psutil.pid_exists(int(owner))):
                found.add(name)
    return found


class Run:
    """A command in a session of its own, with all processes it ever started."""

    def __init__(
        self,
        args: Sequence[str],
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        sigint_ignored: bool = False,
    ) -> None:
        support = str(ROOT / "tests" / "support")
        self.log = directory / "log.txt"
        self.shared_before = set(os.listdir("/dev/shm"))
        self.temporary = Path(tempfile.mkdtemp(prefix="run-"))
        self.process = subprocess.Popen(
            with_sigint(args, ignored=sigint_ignored),
            cwd=directory,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": support,
                "TMPDIR": str(self.temporary),
                **(environment or {}),
            },
        )
        self.started: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.log.read_text()

    def look(self) -> None:
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.started[child.pid] = child
        except psutil.NoSuchProcess:
            pass

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            self.look()
            assert self.process.poll() is None, self.output()[-3000:]
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.1)
        self.look()

    def cores(self) -> list[psutil.Process]:
        """The engine's cores."""
        return cores(self.started.values())

    def workers(self) -> list[psutil.Process]:
        """The engine's workers."""
        return [worker for core in self.cores() for worker in core.children()]

    def alive(self) -> list[psutil.Process]:
        return [process for process in self.started.values() if is_alive(process)]

    def signal_group(self, number: signal.Signals) -> None:
        """As a terminal does it: the engine's processes and the reward's get it, too."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.1)
        return self.process.returncode

    def assert_nothing_left(self) -> None:
        """No process (so no port of one), shared memory or socket of it survives it (for long)."""
        assert self.started, "no child process was ever seen"
        deadline = time.monotonic() + 20
        while alive := self.alive():
            assert time.monotonic() < deadline, (alive, self.output()[-3000:])
            time.sleep(0.1)
        deadline = time.monotonic() + 5
        while (left := abandoned() - self.shared_before) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == set()
        assert [path for path in self.temporary.iterdir() if path.is_socket()] == []

    def end(self) -> None:
        """Leave nothing running, whatever a test has found."""
        self.look()
        self.process.kill()  # does nothing to one that was waited for
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)
