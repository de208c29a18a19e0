"""What worker processes print: shown, but not more of it than can be read."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time

_LINES, _SECONDS = 20, 10.0
"""So many lines of a pool's workers are shown in so many seconds."""
_LENGTH = 1000
"""Of longer lines the beginning is shown; in bytes."""
_READ_BYTES = 1 << 16


class Printed:
    """What one process prints, read in whole lines.

    Args:
        descriptor: of the pipe that it prints to; closed by :meth:`close`.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._begun = b""

    def fileno(self) -> int:
        """For selectors."""
        return self._descriptor

    def read(self) -> list[bytes] | None:
        """The lines that have come; ``None`` after the last, when all have closed the pipe."""
        try:
            read = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return []
        if not read:
            return None
        lines = (self._begun + read).splitlines()
        is_whole = read.endswith((b"\n", b"\r"))
        self._begun = b"" if is_whole else lines.pop()[: _LENGTH + 1]
        return lines

    def rest(self) -> list[bytes]:
        """The lines that are left when the process has ended: not more than a pipe holds."""
        lines = self.read() or []
        if self._begun:
            lines.append(self._begun)
            self._begun = b""
        return lines

    def close(self) -> None:
        """Let go of the pipe."""
        os.close(self._descriptor)


class Console:
    """Shows lines on the error output, and how many it left out.

    Args:
        name: whose lines they are.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._until = -math.inf
        self._room = 0
        self._left_out = 0

    @property
    def due(self) -> float:
        """When to call :meth:`tell`, on the clock of ``time.monotonic``; infinite for never."""
        return self._until if self._left_out else math.inf

    def show(self, lines: list[bytes]) -> None:
        """Show some lines, as far as there is room for them."""
        now = time.monotonic()
        if now >= self._until:
            self.tell()
            self._until, self._room = now + _SECONDS, _LINES
        shown = lines[: self._room]
        self._room -= len(shown)
        self._left_out += len(lines) - len(shown)
        for line in shown:
            text = line[:_LENGTH].decode(errors="replace")
            _print(text if len(line) <= _LENGTH else f"{text}...")

    def tell(self) -> None:
        """Say how many lines were left out since it was last said."""
        if self._left_out:
            _print(
                f"({self._name} printed {self._left_out} lines more: of a reward's processes, "
                f"{_LINES} lines are shown in {_SECONDS:g} s)"
            )
        self._left_out = 0


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads the error output any more
        print(text, file=sys.stderr, flush=True)
