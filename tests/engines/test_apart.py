"""An engine in a process of its own: the same tokens, errors and ends as in this one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from apart_engines import SPEC, RealTimeEngine, start
from synced import send

from copris_lightning.engines import apart_link
from copris_lightning.engines.apart import ApartEngine, placed
from copris_lightning.engines.engine import Chunk, Decoding, Engine, EngineSpec, GenerationRequest
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import EngineError, WeightSyncError

Started = tuple[ApartEngine, Callable[..., Any], psutil.Process]


@contextmanager
def one_started() -> Iterator[Started]:
    """A held engine, a function that runs coroutines on its loop, and its process."""
    before = psutil.Process().children()
    engine, loop = start()
    [process] = [child for child in psutil.Process().children() if child not in before]
    family = [process, *process.children(recursive=True)]
    assert len(family) == 2
    try:
        yield engine, loop.call, process
    finally:
        loop.call(engine.close())
        loop.close()
        assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.fixture(scope="module")
def running() -> Iterator[Started]:
    """For all tests that leave it alive."""
    with one_started() as started:
        yield started


@pytest.fixture
def started(running: Started) -> Started:
    """It is held."""
    engine, call, _ = running
    call(engine.hold())
    return running


@pytest.fixture
def victim() -> Iterator[Started]:
    """For one test."""
    with one_started() as started:
        yield started


async def response(engine: Engine, seed: int, *, tokens: int = 100) -> list[Chunk]:
    request = GenerationRequest(f"r{seed}", (5, 6, 7), tokens, Decoding(), seed)
    async with aclosing(engine.stream(request)) as chunks:
        return [chunk async for chunk in chunks]


async def responses(engine: Engine, **settings: Any) -> list[list[Chunk]]:
    return await asyncio.gather(*(response(engine, seed, **settings) for seed in range(8)))


def test_it_streams_what_it_would_have_streamed_in_this_process(started: Started) -> None:
    engine, call, _ = started

    version = engine.version + 1

    async def here() -> list[list[Chunk]]:
        other = RealTimeEngine()
        await other.start(SPEC)
        await other.release(version)
        found = await responses(other)
        await other.close()
        return found

    call(engine.release(version))
    assert engine.version == version
    made = call(responses(engine))
    for chunks, expected in zip(made, call(here()), strict=True):
        assert [c.token_ids for c in chunks] == [c.token_ids for c in expected]
        for chunk, other in zip(chunks, expected, strict=True):
            assert chunk.logprobs == pytest.approx(other.logprobs, rel=1e-6)
            assert (chunk.version, chunk.ending) == (version, other.ending)
            assert chunk.spans == other.spans
    assert call(engine.score([[1, 2, 3]])) == [[2.0, 3.0]]


@pytest.mark.parametrize("keep", [False, True])
def test_a_hold_ends_streams_with_all_their_tokens_or_keeps_them(
    started: Started, keep: bool
) -> None:
    engine, call, _ = started
    version = engine.version + 1

    async def cut() -> list[list[Chunk]]:
        await engine.release(version)
        streams = asyncio.create_task(responses(engine, tokens=300))
        await asyncio.sleep(0.1)
        load = engine.load()
        assert load is not None
        assert load.running == 8
        await engine.hold(keep=keep)
        await engine.release(version + 1)
        return await streams

    for chunks in call(cut()):
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        assert 0 < tokens == sum(span.length for span in chunks[-1].spans)
        assert chunks[-1].ending == ("length" if keep else "held")
        versions = [span.version for span in chunks[-1].spans]
        assert versions == ([version, version + 1] if keep else [version])


def test_a_stream_that_is_left_is_aborted(started: Started) -> None:
    engine, call, _ = started

    async def leave() -> None:
        await engine.release(engine.version)
        request = GenerationRequest("left", (5,), 10**6, Decoding(), 0)
        async with aclosing(engine.stream(request)) as chunks:
            async for _ in chunks:
                break
        await engine.hold(keep=True)
        await engine.score([[1, 2]])  # what it said last is read with its answer
        load = engine.load()
        assert load is not None
        assert load.running == 0

    call(leave())


def test_weights_come_there_through_files(started: Started) -> None:
    engine, call, _ = started
    send(engine, call, [("one", torch.ones(3)), ("two", torch.ones(2))])
    assert call(engine.explain([])) == "one two"


def test_errors_come_over_with_their_types_notes_and_causes(started: Started) -> None:
    engine, call, _ = started
    with pytest.raises(WeightSyncError, match="did not arrive: broken") as raised:
        send(engine, call, [("broken", torch.ones(3))])
    error: BaseException | None = raised.value
    while error is not None and not isinstance(error, ZeroDivisionError):
        error = error.__cause__
    assert str(error) == "a cause"
    call(engine.release(engine.version))
    with pytest.raises(EngineError, match=r"release of version 9\d: it must be held"):
        call(engine.release(99))

    async def twice() -> None:
        await asyncio.gather(response(engine, 1), response(engine, 1))

    with pytest.raises(EngineError, match="request id 'r1' is in use"):
        call(twice())


def test_all_that_waits_for_a_process_that_dies_fails(victim: Started) -> None:
    engine, call, process = victim
    [below] = process.children()
    call(engine.release(0))

    async def work() -> list[Any]:
        stream = response(engine, 0, tokens=10**6)
        waiting = asyncio.gather(stream, engine.score([]), return_exceptions=True)
        await asyncio.sleep(0.2)
        process.kill()
        return await waiting

    for error in call(work()):
        assert isinstance(error, EngineError)
        assert str(error).endswith("the process that it lives in was killed by SIGKILL")
    with pytest.raises(EngineError, match="was killed by SIGKILL"):
        call(engine.hold())
    assert not psutil.wait_procs([below], timeout=10)[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_signals_to_the_trainer(started: Started, number: signal.Signals) -> None:
    engine, call, process = started
    assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
    process.send_signal(number)
    assert call(engine.score([[1, 2]])) == [[2.0]]


def test_nothing_is_left_of_it_when_the_trainer_is_killed() -> None:
    code = (
        "import sys, time; sys.path[:] = {!r}\n"
        "from apart_engines import start\n"
        "start(); print('started', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code.format(sys.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as trainer:
        try:
            assert trainer.stdout is not None
            assert trainer.stdout.readline() == b"started\n"
            family = psutil.Process(trainer.pid).children(recursive=True)
            assert len(family) == 2
            left = Path(f"/dev/shm/copris-{trainer.pid}-test")
            left.mkdir()
        finally:
            trainer.kill()
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert not left.exists()


def test_an_engine_is_apart_where_it_streams_and_may_be() -> None:
    engine = VLLMEngine()
    assert placed(engine, EngineSpec("m", 8, 100, 98)) is engine
    assert isinstance(placed(engine, SPEC), ApartEngine)
    engine.backend = "ipc"
    assert placed(engine, SPEC) is engine


def test_one_that_falls_silent_is_killed(victim: Started, monkeypatch: Any) -> None:
    engine, call, _ = victim
    # The last test: whatever other engine there is has to speak so often as well.
    monkeypatch.setattr(apart_link, "SILENT_S", 2.0)
    with pytest.raises(EngineError, match="in sent nothing for 2 s, and was killed"):
        call(engine.score([]))
