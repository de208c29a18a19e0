"""A child process that leads a group: killed with all that it has started, gone with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

from copris_lightning.engines.channel import Channel
from copris_lightning.rollout.printed import Printed

_GONE_S = 10.0
"""How long a process that was killed may take to be gone: it may be deep in a system call."""
_RUN = "import sys; sys.path[:] = {!r}; from {} import run; run({}, {})"


class ProcessGroup:
    """A fresh Python process with this one's import path, at work from the start.

    Forking would be unsafe beside the engine's and torch's threads.

    Args:
        module: its function ``run`` is called with two file descriptors: of a socket connected to
            ``channel`` here, which does not block, and of a pipe that ends when this process does.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.channel = Channel(ours)
        watched, self._alive = os.pipe()
        read, printed = os.pipe()
        self.printed = Printed(read)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _RUN.format(sys.path, module, theirs.fileno(), watched)],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=(theirs.fileno(), watched),
                process_group=0,  # not a session: Linux shares processors out among those
            )
        except OSError:
            self.close()
            raise
        finally:
            theirs.close()
            os.close(watched)
            os.close(printed)

    def has_ended(self) -> bool:
        """Whether the process itself is gone; what it started may hold the connection open."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait for the process to end by itself, but not for longer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """Kill the process, if it is still there, and what it has started and left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait(_GONE_S)

    def close(self) -> None:
        """Let go of a process that was killed."""
        self.channel.close()
        self.printed.close()
        os.close(self._alive)

    def how_it_ended(self) -> str:
        """Its exit code or signal, in words."""
        code = self._process.returncode
        if code is None or code >= 0:
            return f"exit code {code}"
        hint = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return f"signal {-code}, {signal.strsignal(-code)}{hint}"
