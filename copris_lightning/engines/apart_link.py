"""The trainer's end of the connection to an engine in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from copris_lightning.core.cap import Load
from copris_lightning.engines.apart_process import BEAT_S, unpacked
from copris_lightning.engines.channel import Channel
from copris_lightning.engines.engine import Chunk, GenerationRequest
from copris_lightning.engines.owner import OWNER_VARIABLE
from copris_lightning.engines.watchdog import exit_reason
from copris_lightning.errors import EngineError

SILENT_S = 300.0
"""How long its loop may say nothing at all, in seconds; imports within a boot hold it up."""
CLOSE_S = 45.0
"""How long the engine may take to close, in seconds."""
_ENDS_S = 5.0
"""How long the process may take to end when there is no more to do, in seconds."""
_GONE_S = 10.0
"""How long a process that was killed may take to be gone, in seconds."""

_RUN = (
    "import sys; sys.path[:] = {!r}; "
    "from copris_lightning.engines.apart_process import run; run({})"
)

Chunks = asyncio.Queue[Chunk | BaseException]


class Link:
    """A process with an engine in it. Made and used on one event loop.

    Args:
        engine: pickled.
        owner: whom the engine's processes end with.

    Raises:
        OSError: the process cannot be started.

    Attributes:
        load: how busy the engine was when it last said something.
    """

    def __init__(self, engine: bytes, owner: str) -> None:
        self.load: Load | None = None
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._chunks: dict[int, Chunks] = {}
        self._calls: dict[int, asyncio.Future[tuple[Any, int]]] = {}
        self._lost: EngineError | None = None
        self._silent = 0
        self._hangs = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _RUN.format(sys.path, theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**os.environ, OWNER_VARIABLE: owner},
                process_group=0,  # a Ctrl-C is the trainer's
            )
        ours.setblocking(False)
        self._channel = Channel(ours)
        self._loop.add_reader(ours, self._read)
        self._watching = self._loop.create_task(self._watch())
        self._channel.send_pickled(engine)
        self._flush()

    # -- what is asked of it -----------------------------------------------------------------

    async def call(self, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What a method of the engine returns, and the engine's version then.

        Raises:
            EngineError: the process is gone; or whatever the engine raised.
        """
        number = next(self._numbers)
        answer = self._calls[number] = self._loop.create_future()
        try:
            self._send(number, method, given, named)
            return await answer
        except asyncio.CancelledError:
            with suppress(EngineError):
                self._send(number, "stop")
            raise
        finally:
            del self._calls[number]

    @contextmanager
    def stream(self, request: GenerationRequest) -> Iterator[Chunks]:
        """The chunks of a response as they come; left before the last, it is aborted.

        Raises:
            EngineError: the process is gone.
        """
        number = next(self._numbers)
        chunks = self._chunks[number] = Chunks()
        try:
            self._send(number, "stream", request)
            yield chunks
        finally:
            if self._chunks.pop(number, None) is not None:
                with suppress(EngineError):
                    self._send(number, "stop")

    def _send(self, *order: Any) -> None:
        if self._lost is not None:
            raise _again(self._lost)
        with suppress(OSError):  # its end is about to be read
            self._channel.send(order)
        self._flush()

    def _flush(self) -> None:
        with suppress(OSError):
            self._channel.flush()
        if self._channel.is_behind:
            self._loop.add_writer(self._channel.fileno(), self._flush)
        else:
            self._loop.remove_writer(self._channel.fileno())

    # -- what it says ------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            messages = self._channel.receive()
        except (EOFError, OSError):
            self._lose()
            return
        self._silent = 0
        for said, self.load in messages:
            for kind, *what in said:
                if kind == "chunk":
                    self._chunk(*what)
                elif kind == "done":
                    self._answer(*what)
                elif kind == "failed":
                    self._fail(*what)

    def _chunk(self, number: int, *packed: Any) -> None:
        chunks = self._chunks.get(number)
        if chunks is not None:
            chunk = unpacked(*packed)
            chunks.put_nowait(chunk)
            if chunk.ending is not None:
                del self._chunks[number]

    def _answer(self, number: int, result: Any, version: int) -> None:
        answer = self._calls.get(number)
        if answer is not None and not answer.done():
            answer.set_result((result, version))

    def _fail(self, number: int, error: BaseException, cause: BaseException | None) -> None:
        error.__cause__ = cause
        answer, chunks = self._calls.get(number), self._chunks.pop(number, None)
        if chunks is not None:
            chunks.put_nowait(error)
        elif answer is not None and not answer.done():
            answer.set_exception(error)

    # -- its end -----------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Kill a process whose loop hangs. Counted in looks: a trainer that was stopped meanwhile
        has not been listening."""
        while self._silent < SILENT_S / BEAT_S:
            await asyncio.sleep(BEAT_S)
            self._silent += 1
        self._hangs = True
        self.kill()

    def _lose(self) -> None:
        """It is gone: so is whatever waits for it."""
        self._watching.cancel()
        self._loop.remove_reader(self._channel.fileno())
        self._loop.remove_writer(self._channel.fileno())
        self.kill()  # what it has left behind
        self._wait(_GONE_S)
        reason = exit_reason(self._process.returncode)
        if self._hangs:
            reason = f"sent nothing for {SILENT_S:g} s, and was killed"
        self._lost = EngineError(f"the engine died: the process that it lives in {reason}")
        for chunks in self._chunks.values():
            chunks.put_nowait(_again(self._lost))
        self._chunks.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(_again(self._lost))

    async def close(self) -> None:
        """Close the engine, and end the process."""
        with suppress(EngineError, TimeoutError):
            await asyncio.wait_for(self.call("close", (), {}), CLOSE_S)
        if self._lost is None:
            self._channel.shut()
            await self._loop.run_in_executor(None, self._wait, _ENDS_S)
            self._lose()
        self._channel.close()

    def _wait(self, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def kill(self) -> None:
        """Kill it and all below it; from any thread."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _again(error: EngineError) -> EngineError:
    """The same error for one more who waits."""
    return EngineError(*error.args)
