"""The main thread's waits end when the run is to end, whatever the engine does meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from simulated_fits import LoggingEngine, build
from torch import Tensor

from copris_lightning.datamodules import loop_thread, session


class StoppingEngine(LoggingEngine):
    """In one of its methods it calls a function and then waits for ever."""

    def __init__(self, where: str, stop: Callable[[], None], calls: int = 2) -> None:
        super().__init__([])
        self.where = where
        self.stop = stop
        self.left = calls

    async def _come_past(self, place: str) -> None:
        if place == self.where:
            self.left -= 1
            if self.left == 0:
                self.stop()
                await asyncio.Event().wait()

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await self._come_past("sync")
        await super().update_weights(weights, version)

    async def score(self, sequences: Any) -> Any:
        await self._come_past("score")
        return await super().score(sequences)

    async def start(self, spec: Any) -> None:
        await self._come_past("boot")
        await super().start(spec)


def rollout_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "copris-rollout"]


@pytest.mark.parametrize(
    ("place", "calls", "number"),
    [
        ("boot", 1, signal.SIGINT),  # SIGTERM ends the process: Lightning does not catch it yet
        *(
            (place, n, number)
            for place, n in (("sync", 1), ("sync", 2), ("score", 2))
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)
def test_a_run_that_waits_for_its_engine_can_be_stopped(
    tiny_checkpoint: Path, tmp_path: Path, place: str, calls: int, number: signal.Signals
) -> None:
    engine = StoppingEngine(place, lambda: os.kill(os.getpid(), number), calls)
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path)
    data.engine = engine
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # Lightning ends the process itself after a Ctrl-C.
        with pytest.raises(SystemExit if number == signal.SIGINT else SIGTERMException):
            trainer.fit(module, data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.closed == 1
    assert rollout_threads() == []


def test_an_engine_that_does_not_let_itself_be_closed_is_killed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CLEANUP_S", 0.3)
    monkeypatch.setattr(loop_thread, "CLEANUP_S", 0.3)
    released = threading.Event()

    class Unclosable(LoggingEngine):
        killed = 0

        async def close(self) -> None:
            released.wait(30)  # on the loop

        def kill(self) -> None:
            self.killed += 1
            released.set()

    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=1)
    data.engine = engine = Unclosable([])
    with pytest.raises(loop_thread.StuckError, match=r"Unclosable\.close"):
        trainer.fit(module, data)
    assert engine.killed == 1
