"""The main thread's waits end when the run is to end, whatever the engine does meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from simulated_fits import LoggingEngine, build

from copris_lightning.rollout import loop_thread, session

Threads = Callable[[], list[threading.Thread]]


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

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        if self.is_sent:
            await self._come_past("sync")
        await super().release(version, clear_kv=clear_kv)

    async def score(self, sequences: Any) -> Any:
        await self._come_past("score")
        return await super().score(sequences)

    async def start(self, spec: Any) -> None:
        await self._come_past("boot")
        await super().start(spec)


@pytest.mark.parametrize(
    ("place", "calls", "number"),
    [
        (place, n, number)
        for place, n in (("boot", 1), ("sync", 1), ("sync", 2), ("score", 2))
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_a_run_that_waits_for_its_engine_can_be_stopped(
    tiny_checkpoint: Path,
    tmp_path: Path,
    rollout_threads: Threads,
    place: str,
    calls: int,
    number: signal.Signals,
) -> None:
    engine = StoppingEngine(place, lambda: os.kill(os.getpid(), number), calls)
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path)
    data.engine = engine
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        # Lightning ends the process itself after a Ctrl-C, and does not know SIGTERM in the boot.
        ends = number == signal.SIGINT or place == "boot"
        with pytest.raises(SystemExit if ends else SIGTERMException):
            trainer.fit(module, data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.closed == 1
    assert rollout_threads() == []


class SlowToStop(LoggingEngine):
    """Told to stop while it boots; it is told again whatever it does about that."""

    def __init__(self, first: signal.Signals, again: signal.Signals) -> None:
        super().__init__([])
        self.first, self.again = first, again
        self.cleaned: list[str] = []

    async def _clean(self, what: str) -> None:
        os.kill(os.getpid(), self.again)
        await asyncio.sleep(0.5)
        self.cleaned.append(what)

    async def start(self, spec: Any) -> None:
        try:
            os.kill(os.getpid(), self.first)
            await asyncio.Event().wait()
        finally:
            await self._clean("start")

    async def close(self) -> None:
        await self._clean("close")


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_boot_that_is_stopped_twice_is_cleaned_up_whole(
    tiny_checkpoint: Path,
    tmp_path: Path,
    rollout_threads: Threads,
    first: signal.Signals,
    again: signal.Signals,
) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path)
    data.engine = engine = SlowToStop(first, again)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            trainer.fit(module, data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == (1 if first == signal.SIGINT else 128 + signal.SIGTERM)
    assert engine.cleaned == ["start", "close"]
    assert rollout_threads() == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_while_the_engine_is_closed_kills_it(
    tiny_checkpoint: Path, tmp_path: Path, rollout_threads: Threads
) -> None:
    class Leaving(LoggingEngine):
        killed = 0

        async def close(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)

        def kill(self) -> None:
            self.killed += 1

    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=1)
    data.engine = engine = Leaving([])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(module, data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert engine.killed == 1
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
