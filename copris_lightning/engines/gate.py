"""What holding an engine means to its requests, whatever the engine: who waits, and who made what.

An engine that can be held has one :class:`Gate`. A request passes it on its way in; a hold shuts
it, and waits for those that are just passing, so that whoever then stops the engine stops them all.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from copris_lightning.core.segments import Span
from copris_lightning.errors import WeightSyncError


class Gate:
    """Made shut. Used on one event loop.

    Attributes:
        is_open: whether requests pass.
        version: policy version of the weights that generate now, or did before it was shut.
        endings: holds so far that ended all streams. A stream that was ended by one is one that saw
            another number when it began.
        has_new_weights: whether its weights are those of the next version, or have begun to be.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.version = 0
        self.endings = 0
        self.has_new_weights = False
        self._clears = [0]
        self._waiting: set[asyncio.Future[None]] = set()
        self._passing = 0
        self._passed = asyncio.Event()
        self._passed.set()

    @property
    def label(self) -> int:
        """Version of what is made now, shut or not: it rises by one with each sync."""
        return self.version + self.has_new_weights

    @asynccontextmanager
    async def passing(self, endings: int) -> AsyncIterator[bool]:
        """Wait until it is open; nobody shuts it before the block is left.

        Args:
            endings: :attr:`endings`, when the stream began.

        Yields:
            whether the request may go on: otherwise a hold has ended its stream.
        """
        while not self.is_open and endings == self.endings:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.add(turn)
            try:
                await turn
            finally:
                self._waiting.discard(turn)
        if endings != self.endings:
            yield False
            return
        self._passing += 1
        self._passed.clear()
        try:
            yield True
        finally:
            self._passing -= 1
            if not self._passing:
                self._passed.set()

    async def shut(self, *, keep: bool) -> None:
        """Let no request pass, and wait for those that are passing.

        Args:
            keep: whether the streams there are go on after the next :meth:`open`.
        """
        self.is_open = False
        await self._passed.wait()
        if not keep:
            self.endings += 1
            self._wake()

    def renew(self) -> None:
        """New weights are about to come.

        Raises:
            WeightSyncError: it is open.
        """
        if self.is_open:
            raise WeightSyncError("new weights have come while the engine generates; hold it first")
        self.has_new_weights = True

    def open(self, version: int, *, clear_kv: bool) -> None:
        """Let requests pass.

        Args:
            version: of the weights that generate from now on.
            clear_kv: whether keys and values computed before are gone.
        """
        self.version, self.has_new_weights = version, False
        if clear_kv and version > self._clears[-1]:
            self._clears.append(version)
        self.is_open = True
        self._wake()

    def spans(self, start: int, made: Iterable[tuple[int, int]]) -> tuple[Span, ...]:
        """What an engine says of a stream's tokens, with the versions of their keys and values.

        Args:
            start: version under which the request went in: it reads nothing older, since keys and
                values are cached under a salt of that version.
            made: (length, version) of each run of tokens, oldest first.
        """
        return tuple(
            Span(length, version, max(start, self._clears[bisect_right(self._clears, version) - 1]))
            for length, version in made
            if length
        )

    def _wake(self) -> None:
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)
