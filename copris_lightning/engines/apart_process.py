"""An engine in a process of its own, as it looks from inside: :func:`run` is that process.

What is said to it and what it says are pickled tuples, see :mod:`copris_lightning.engines.apart`.
All that is said in one turn of the loop goes in one message: reading it costs the trainer's process
little, however many streams there are.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
from array import array
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from typing import Any

from copris_lightning.engines.channel import Channel
from copris_lightning.engines.engine import Chunk, Engine, GenerationRequest
from copris_lightning.engines.owner import remove_hand_over
from copris_lightning.errors import EngineError

BEAT_S = 1.0
"""How often it says that its loop goes on, in seconds."""


def run(connection: int) -> None:
    """Serve an engine until the other end is closed, and then leave nothing behind.

    Args:
        connection: file descriptor of a connected stream socket; the engine comes first.
    """
    # Whoever is told to stop is the trainer, which closes the engine. A handler, since what is
    # ignored would be ignored by the processes that are started here as well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.set_inheritable(connection, False)
    end = socket.socket(fileno=connection)
    channel = Channel(end)
    engine, *rest = channel.receive()
    end.setblocking(False)
    loop = engine.new_event_loop()
    asyncio.set_event_loop(loop)
    server = _Server(engine, channel, loop)
    try:
        loop.run_until_complete(server.serve(rest))
    finally:
        if not server.was_closed:  # the trainer is gone
            remove_hand_over()
            os.killpg(0, signal.SIGKILL)
        os._exit(0)  # no thread of vLLM's holds this up


class _Server:
    """Does what it is told, and says what comes of it.

    Args:
        engine: is not running yet.
        channel: to the trainer.
        loop: the engine's.

    Attributes:
        was_closed: whether the engine was.
    """

    def __init__(self, engine: Engine, channel: Channel, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._channel = channel
        self._loop = loop
        self._work: dict[int, asyncio.Task[None]] = {}
        self._said: list[tuple[Any, ...]] = []
        self._ended = asyncio.Event()
        self.was_closed = False

    async def serve(self, orders: list[tuple[Any, ...]]) -> None:
        """Until the connection is closed.

        Args:
            orders: those that have come already.
        """
        self._loop.add_reader(self._channel.fileno(), self._read)
        for order in orders:
            self._take(order)
        while not self._ended.is_set():
            self._say("beat")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), BEAT_S)

    def _read(self) -> None:
        try:
            for order in self._channel.receive():
                self._take(order)
        except (EOFError, OSError):
            self._loop.remove_reader(self._channel.fileno())
            self._ended.set()

    def _take(self, order: tuple[Any, ...]) -> None:
        number, what, *args = order
        if what == "stop":
            if number in self._work:
                self._work[number].cancel()
            return
        work = self._stream(number, args[0]) if what == "stream" else self._call(number, what, args)
        self._work[number] = self._loop.create_task(self._done(number, work))

    async def _done(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 - raised to whoever asked
            self._say("failed", number, portable(error), portable(error.__cause__))
        finally:
            del self._work[number]

    async def _stream(self, number: int, request: GenerationRequest) -> None:
        async with aclosing(self._engine.stream(request)) as chunks:
            async for chunk in chunks:
                self._say("chunk", number, *packed(chunk))

    async def _call(self, number: int, method: str, args: list[Any]) -> None:
        given, named = args
        result = await getattr(self._engine, method)(*given, **named)
        self.was_closed |= method == "close"
        self._say("done", number, result, self._engine.version)

    def _say(self, *what: Any) -> None:
        if not self._said:
            self._loop.call_soon(self._send)
        self._said.append(what)

    def _send(self) -> None:
        said, self._said = self._said, []
        with suppress(OSError):  # seen by whoever reads
            self._channel.send((said, self._engine.load()))
            if self._channel.is_behind:
                self._loop.add_writer(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        with suppress(OSError):
            self._channel.flush()
        if not self._channel.is_behind:
            self._loop.remove_writer(self._channel.fileno())


def packed(chunk: Chunk) -> tuple[Any, ...]:
    """A chunk in few objects, four bytes a token and a log-prob; see :func:`unpacked`."""
    logprobs = None if chunk.logprobs is None else array("f", chunk.logprobs).tobytes()
    tokens = array("i", chunk.token_ids).tobytes()
    return tokens, logprobs, chunk.version, chunk.ending, chunk.spans


def unpacked(tokens: bytes, logprobs: bytes | None, version: int, ending: Any, spans: Any) -> Chunk:
    """The chunk."""
    values = None if logprobs is None else tuple(memoryview(logprobs).cast("f"))
    return Chunk(tuple(memoryview(tokens).cast("i")), values, version, ending, spans)


def portable(error: BaseException | None) -> BaseException | None:
    """The error, if it survives being pickled; otherwise one that says the same."""
    if error is None:
        return None
    try:
        same: BaseException = pickle.loads(pickle.dumps(error))
        return same
    except Exception:  # noqa: BLE001 - a class may raise anything
        return EngineError(f"{type(error).__name__}: {error}")
