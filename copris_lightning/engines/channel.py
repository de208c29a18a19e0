"""Messages between a process and a child of its own, where the one need not wait for the other."""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!Q")
_READ_BYTES = 1 << 16


class Channel:
    """One end of a connection. What is sent is pickled, and comes whole or not at all.

    Args:
        end: a connected stream socket. If it does not block, neither does anything here: what
            cannot be sent yet is kept for :meth:`flush`.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._coming = bytearray()
        self._going = bytearray()

    def fileno(self) -> int:
        """For selectors."""
        return self._socket.fileno()

    @property
    def is_behind(self) -> bool:
        """Whether something is still to be sent."""
        return bool(self._going)

    def send(self, message: object) -> None:
        """Send a message, after all that are still to be sent.

        Raises:
            OSError: the other end is gone.
        """
        self.send_pickled(pickle.dumps(message))

    def send_pickled(self, pickled: bytes) -> None:
        """The same of one that is pickled already.

        Raises:
            OSError: the other end is gone.
        """
        self._going += _LENGTH.pack(len(pickled)) + pickled
        self.flush()

    def flush(self) -> None:
        """Send what can be sent now.

        Raises:
            OSError: the other end is gone.
        """
        try:
            while self._going:
                del self._going[: self._socket.send(self._going)]
        except BlockingIOError:
            pass

    def receive(self) -> list[Any]:
        """The messages that have come, at least one if the socket blocks.

        Raises:
            EOFError: the other end is closed.
            OSError: it is gone.
        """
        while not (messages := self._whole()):
            try:
                read = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return []
            if not read:
                raise EOFError
            self._coming += read
        return messages

    def _whole(self) -> list[Any]:
        messages, start = [], 0
        while len(self._coming) >= start + _LENGTH.size:
            begin = start + _LENGTH.size
            end = begin + _LENGTH.unpack_from(self._coming, start)[0]
            if len(self._coming) < end:
                break
            messages.append(pickle.loads(self._coming[begin:end]))
            start = end
        del self._coming[:start]
        return messages

    def shut(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Let go of the connection."""
        self._socket.close()
