"""Nothing waits for a process that has died, nor for ever for one that lives."""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from copris_lightning.engines import vllm, vllm_holds, vllm_receiver, watchdog
from copris_lightning.engines.watchdog import Deadlines, SilenceWatch, Watchdog
from copris_lightning.errors import ConfigurationError, EngineError

LONG = ("deadlines.sync_s", 60.0)
SLEEP = "import signal, time; signal.signal(2, signal.SIG_DFL); print(flush=True); time.sleep(600)"


class Child:
    """A real process, as the watchdog sees one of vLLM's."""

    name = "EngineCore"

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True
        )
        self.sentinel = os.pidfd_open(self.process.pid)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.sentinel)


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child(SLEEP)
    yield made
    made.end()


async def never() -> None:
    await asyncio.Event().wait()


def test_an_answer_is_passed_on(child: Child) -> None:
    async def run() -> int:
        dog = Watchdog([child])
        try:
            return await dog.guard(asyncio.sleep(0.01, 7), "count", LONG)
        finally:
            dog.close()
            dog.close()

    assert asyncio.run(run()) == 7


def test_the_answers_own_error_is_passed_on(child: Child) -> None:
    async def fail() -> None:
        raise KeyError("weight")

    async def run() -> None:
        await Watchdog([child]).guard(fail(), "load", LONG)

    with pytest.raises(KeyError, match="weight"):
        asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_death_ends_the_wait_and_is_named(child: Child, number: signal.Signals) -> None:
    async def run() -> None:
        asyncio.get_running_loop().call_later(0.1, child.process.send_signal, number)
        await Watchdog([child]).guard(never(), "load the weights", LONG)

    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        asyncio.run(run())
    assert str(caught.value) == (
        f"the engine died: EngineCore was killed by {number.name} while it was to load the weights"
    )
    assert time.monotonic() - began < 20


def test_a_death_is_told_once(child: Child) -> None:
    told: list[str] = []

    async def run() -> None:
        dog = Watchdog([child])
        dog.on_death(lambda: told.append("dead"))
        await asyncio.sleep(0.05)
        assert told == []
        child.process.kill()
        await dog.wait_for_death(LONG[1])
        await asyncio.sleep(0.05)
        dog.close()

    asyncio.run(run())
    assert told == ["dead"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", "ended by itself with exit status 0"),
        ("raise SystemExit(3)", "ended with exit status 3"),
    ],
)
def test_an_exit_is_named_with_its_cause(code: str, words: str) -> None:
    child = Child(code)

    async def run() -> None:
        await Watchdog([child], lambda: "ValueError: no memory").guard(never(), "wake up", LONG)

    with pytest.raises(EngineError) as caught:
        asyncio.run(run())
    assert str(caught.value).startswith("the engine died: ValueError: no memory: EngineCore ")
    assert words in str(caught.value)
    child.end()


def test_one_death_among_several_is_enough_and_only_it_is_named(child: Child) -> None:
    other = Child(SLEEP)
    other.name = "EngineCore_DP1"

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.05, other.process.kill)
        await Watchdog([child, other]).guard(never(), "load the weights", LONG)

    with pytest.raises(EngineError, match="died: EngineCore_DP1 was killed by SIGKILL while"):
        asyncio.run(run())
    other.end()


def test_a_process_that_is_dead_already_is_not_waited_for(child: Child) -> None:
    child.process.kill()
    child.process.wait()

    async def run() -> None:
        await Watchdog([child]).guard(never(), "load the weights", LONG)

    with pytest.raises(EngineError, match="killed by SIGKILL"):
        asyncio.run(run())


def test_a_process_that_lives_and_hangs_meets_the_deadline(child: Child) -> None:
    cancelled = []

    async def hang() -> None:
        try:
            await never()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def run() -> None:
        await Watchdog([child]).guard(hang(), "load the weights", ("deadlines.sync_s", 0.1))

    with pytest.raises(EngineError, match=r"not load the weights within deadlines\.sync_s=0\.1 s"):
        asyncio.run(run())
    assert cancelled


@pytest.mark.parametrize("how", ["deadline", "death"])
def test_a_call_that_ignores_its_cancellation_is_left_behind(
    child: Child, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "_CANCEL_S", 0.1)
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    async def run() -> None:
        if how == "death":
            child.process.kill()
        try:
            await Watchdog([child]).guard(
                stubborn(), "sleep", ("x", 0.2 if how == "deadline" else 60)
            )
        finally:
            release.set()

    began = time.monotonic()
    with pytest.raises(EngineError):
        asyncio.run(run())
    assert time.monotonic() - began < 20


def test_a_wait_that_is_cancelled_cancels_the_call(child: Child) -> None:
    ended = []

    async def hang() -> None:
        try:
            await never()
        finally:
            ended.append(True)

    async def run() -> None:
        task = asyncio.create_task(Watchdog([child]).guard(hang(), "sleep", LONG))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(run())
    assert ended


@pytest.mark.parametrize("field", ["boot_s", "stall_s", "sync_s"])
def test_deadlines_are_above_zero(field: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{field}=0 must be above 0"):
        Deadlines(**{field: 0})


def test_silence_is_noticed_when_there_is_work_and_only_then(
    loop: asyncio.AbstractEventLoop,
) -> None:
    noticed: list[float] = []
    watch = SilenceWatch(10.0, lambda: noticed.append(loop.time()))

    async def run() -> None:
        with watch.working():
            await asyncio.sleep(9)
            with watch.working():
                await asyncio.sleep(0.5)
                watch.heard()
            await asyncio.sleep(9)
        await asyncio.sleep(100)
        assert noticed == []
        with watch.working():
            began = loop.time()
            await asyncio.sleep(3)
            watch.heard()
            await asyncio.sleep(50)
        assert noticed == [began + 13]
        with watch.working():
            watch.rest(True)
            await asyncio.sleep(95)
            watch.rest(False)
            await asyncio.sleep(9)
            assert len(noticed) == 1
            await asyncio.sleep(12)
        assert len(noticed) == 2

    loop.run_until_complete(run())


@pytest.mark.parametrize("module", [vllm, vllm_holds, vllm_receiver])
def test_every_call_to_vllm_is_watched(module: ModuleType) -> None:
    """A bare ``await llm.something()`` would hang for ever if the engine died within it."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    awaited = [ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Await)]
    assert any(call.startswith(("self._processes.call(", "self._call(")) for call in awaited)
    assert [call for call in awaited if call.startswith(("llm.", "self._llm.", "(await"))] == []
