"""An engine that lives in a process of its own, off the trainer's.

What an engine's client does for every token, such as decoding what vLLM's core sends, it does under
the lock of Python's interpreter. Beside a trainer in the same process it holds that up. So where
the engine generates while the trainer trains, it goes to a process of its own with its client, and
here remains one message per turn of its loop.

There a message is ``(number, what, ...)``: ``stream`` and a request, a method of the engine with
its arguments, or ``stop`` for what bears that number. Here it is what was said in a turn, each a
tuple that begins with ``chunk``, ``done``, ``failed`` or ``beat``, and the engine's load.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from copris_lightning.core.cap import Load
from copris_lightning.engines.apart_link import Link
from copris_lightning.engines.engine import Chunk, Engine, EngineSpec, GenerationRequest
from copris_lightning.engines.owner import this_process
from copris_lightning.errors import EngineError
from copris_lightning.weights.files import FilesTransport, hand_over_prefix
from copris_lightning.weights.transport import Run, Transport


def placed(engine: Engine, spec: EngineSpec) -> Engine:
    """The engine as a run is to use it: in a process of its own, where it generates while the
    trainer trains and says that it may be moved (``may_be_apart``)."""
    may = getattr(engine, "may_be_apart", False)
    # The main module is not imported there.
    if spec.streams and may and type(engine).__module__ != "__main__":
        return ApartEngine(engine)
    return engine


class ApartEngine:
    """An engine in a process of its own. See :class:`~copris_lightning.engines.engine.Engine`.

    Its errors come over with their types. If its process dies, all that waits for it fails with an
    :class:`EngineError`; so it does, and the process is killed, if that falls silent.

    Args:
        engine: not started; it takes its weights through files. It is sent there, a copy stays.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._link: Link | None = None
        self.version: int = engine.version
        """Policy version of the weights that generate now."""

    @property
    def dtype(self) -> str | None:
        """The precision that it is told to compute in, by torch's name."""
        return getattr(self._engine, "dtype", None)

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """An ordinary asyncio loop."""
        return asyncio.new_event_loop()

    def validate(self, spec: EngineSpec) -> None:
        """Check its settings; see :class:`Engine`."""
        self._engine.validate(spec)

    async def start(self, spec: EngineSpec) -> None:
        """Start the process, and the engine in it.

        Raises:
            EngineError: it did not start; says why.
        """
        self.validate(spec)
        hand_over = hand_over_prefix(self._engine.sync_directory)
        self._link = Link(pickle.dumps(self._engine), this_process(hand_over))
        try:
            await self._call("start", spec)
        except BaseException:
            await self.close()
            raise

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response. See :class:`Engine`."""
        with self._running().stream(request) as chunks:
            while True:
                chunk = await chunks.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
                if chunk.ending is not None:
                    return

    async def hold(self, *, keep: bool = False) -> None:
        """Stop generating. See :class:`Engine`."""
        await self._call("hold", keep=keep)

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        """Generate again. See :class:`Engine`."""
        await self._call("release", version, clear_kv=clear_kv)

    def load(self) -> Load | None:
        """As its process has said last."""
        return None if self._link is None else self._link.load

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs of the model's own distribution. See :class:`Engine`."""
        scores: list[list[float]] | None = await self._call("score", sequences)
        return scores

    # -- weights: see :class:`copris_lightning.weights.transport.Receiver` -------------------

    def transport(self, rank: int, run: Run) -> Transport:
        """Through files. See :class:`Engine`."""
        return FilesTransport(self, self._engine.sync_directory, rank, run)

    async def begin_load(self) -> None:
        """See :class:`Receiver`."""
        await self._call("begin_load")

    async def load_shard(self, path: Path) -> None:
        """See :class:`Receiver`."""
        await self._call("load_shard", path)

    async def end_load(self) -> None:
        """See :class:`Receiver`."""
        await self._call("end_load")

    async def load_adapter(self, folder: Path) -> None:
        """See :class:`Receiver`."""
        await self._call("load_adapter", folder)

    async def explain(self, paths: Sequence[Path]) -> str:
        """See :class:`Receiver`."""
        return str(await self._call("explain", paths))

    # -- end ---------------------------------------------------------------------------------

    async def close(self) -> None:
        """End the engine and its process."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    def kill(self) -> None:
        """Kill its process, and all below that."""
        if self._link is not None:
            self._link.kill()

    async def _call(self, method: str, *given: Any, **named: Any) -> Any:
        result, self.version = await self._running().call(method, given, named)
        return result

    def _running(self) -> Link:
        if self._link is None:
            raise EngineError("the engine is not running")
        return self._link
