"""Engines for processes of their own, without vLLM."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from receivers import ListeningReceiver

from copris_lightning.engines.apart import ApartEngine
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import StepTime
from copris_lightning.errors import WeightSyncError
from copris_lightning.rollout.loop_thread import LoopThread

SPEC = EngineSpec("none", 8, 400, 98, streams=True)


def start() -> tuple[ApartEngine, LoopThread]:
    """A held engine in a process of its own, and its loop here."""
    engine = ApartEngine(RealTimeEngine())
    loop = LoopThread(engine.new_event_loop)
    loop.call(engine.start(SPEC))
    return engine, loop


class RealTimeEngine(ListeningReceiver, SimulatedEngine):
    """The simulated engine in real time, a millisecond a step. A process waits below it.

    It says with `explain` which weights have come, and refuses those of a model named ``broken``.
    """

    may_be_apart = True
    sync_directory = None

    def __init__(self) -> None:
        SimulatedEngine.__init__(self, step_time=StepTime(1e-3, 0.0), stream_interval=4)
        ListeningReceiver.__init__(self)

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    async def start(self, spec: EngineSpec) -> None:
        await super().start(spec)
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.below = await asyncio.to_thread(subprocess.Popen, command)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        if not sequences:  # hangs
            time.sleep(600)  # noqa: ASYNC251
        return [[float(token) for token in tokens[1:]] for tokens in sequences]

    async def end_load(self) -> None:
        await super().end_load()
        if any("broken" in shard for shard in self.shards):
            error = WeightSyncError("the weights did not arrive: broken")
            error.add_note("while it was tested")
            raise error from ZeroDivisionError("a cause")

    async def explain(self, paths: Sequence[Path]) -> str:
        return " ".join(sorted(name for shard in self.shards for name in shard))

    async def close(self) -> None:
        self.below.kill()
        self.below.wait()
        await super().close()
