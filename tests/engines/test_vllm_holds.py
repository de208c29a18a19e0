"""Holds on the real engine: no token is lost, and each bears the version that made it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import pytest
import torch
from copris_testing import reference_logprobs
from responses import LONG, PROMPT
from synced import changed, send, sync
from transformers import AutoModelForCausalLM

from copris_lightning.core.sampling import Sampling
from copris_lightning.engines.engine import Chunk, Decoding, Engine, GenerationRequest, Span
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import EngineError, WeightSyncError

Running = tuple[VLLMEngine, Callable[..., Any]]


@pytest.fixture
def synced(running_vllm: Running, model: Any) -> Running:
    """The engine with the checkpoint's own weights."""
    engine, call = running_vllm
    sync(engine, call, model.named_parameters())
    return running_vllm


async def stream(
    engine: Engine, tokens: tuple[int, ...] = PROMPT, *, n: int = 200, temperature: float = 1.0
) -> list[Chunk]:
    """All chunks of a response."""
    name = f"test-{random.random()}"
    request = GenerationRequest(name, tokens, n, Decoding(Sampling(temperature)), seed=0)
    async with aclosing(engine.stream(request)) as chunks:
        return [chunk async for chunk in chunks]


def joined(chunks: list[Chunk]) -> tuple[list[int], list[float]]:
    assert all(chunk.ending is None and not chunk.spans for chunk in chunks[:-1])
    assert chunks[-1].ending is not None
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [x for chunk in chunks for x in chunk.logprobs or ()]
    assert len(tokens) == len(logprobs) == sum(span.length for span in chunks[-1].spans)
    return tokens, logprobs


async def started(engine: Engine, count: int, **settings: Any) -> list[asyncio.Task[list[Chunk]]]:
    return [asyncio.create_task(stream(engine, (5, 6, 7, i), **settings)) for i in range(2, count)]


def test_a_hold_at_any_moment_loses_no_token_and_greedy_decoding_goes_on_as_uncut(
    synced: Running,
) -> None:
    engine, call = synced
    rng = random.Random(0)

    async def cut(prompt: tuple[int, ...], uncut: list[int]) -> int:
        made: list[int] = []
        holds = 0
        while len(made) < len(uncut):
            left = len(uncut) - len(made)
            task = asyncio.create_task(stream(engine, (*prompt, *made), n=left, temperature=0.0))
            await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 0.1)]))
            await engine.hold()
            tokens, _ = joined(await task)
            made += tokens
            holds += task.result()[-1].ending == "held"
            await engine.release(engine.version)
        assert made == uncut
        return holds

    holds = 0
    for i in range(4):
        prompt = (5, 6, 7, 2 + i)
        uncut, _ = joined(call(stream(engine, prompt, n=100, temperature=0.0)))
        holds += call(cut(prompt, uncut))
    assert holds > 4


def test_a_hold_ends_streams_that_nobody_reads_and_those_on_their_way(synced: Running) -> None:
    engine, call = synced

    async def hold() -> None:
        request = GenerationRequest(f"slow-{random.random()}", PROMPT, 200, Decoding(), 0)
        async with aclosing(engine.stream(request)) as slow:
            first = await anext(slow)
            tasks = await started(engine, 14)
            await asyncio.sleep(0)  # they begin, and none has been admitted yet
            await engine.hold()
            rest = [chunk async for chunk in slow]
        joined([first, *rest])
        for task in tasks:
            chunks = await task
            joined(chunks)
            assert chunks[-1].ending == "held"
        waiting = await started(engine, 5)
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in waiting)
        assert engine.load() is not None
        assert engine.load().running == 0
        await engine.hold()
        ended = await asyncio.gather(*waiting)
        assert [[(c.token_ids, c.ending) for c in chunks] for chunks in ended] == [
            [((), "held")]
        ] * 3
        await engine.release(engine.version)

    call(hold())


def test_spans_are_the_versions_that_made_each_token(synced: Running, model: Any) -> None:
    engine, call = synced
    for _ in range(3):
        version = engine.version

        async def some(version: int = version) -> list[list[Chunk]]:
            tasks = [asyncio.create_task(stream(engine, LONG, n=n)) for n in (10, 60, 100)]
            await asyncio.sleep(random.uniform(0.0, 0.2))
            await engine.hold()
            return await asyncio.gather(*tasks)

        for chunks in call(some()):
            tokens, logprobs = joined(chunks)
            expected = reference_logprobs(model, [*LONG, *tokens], len(LONG))
            assert not tokens or (expected - torch.tensor(logprobs)).abs().max() < 1e-4
            whole = (Span(len(tokens), version, version),) if tokens else ()
            assert chunks[-1].spans == whole
            assert {chunk.version for chunk in chunks} == {version}
        send(engine, call, changed(model).named_parameters())
        call(engine.release(version + 1))


@pytest.mark.parametrize("clear_kv", [False, True])
def test_a_kept_hold_tells_two_versions_apart(synced: Running, model: Any, clear_kv: bool) -> None:
    engine, call = synced
    old = engine.version

    async def begin() -> asyncio.Task[list[Chunk]]:
        task = asyncio.create_task(stream(engine, LONG, n=100))
        await asyncio.sleep(0.1)
        await engine.hold(keep=True)
        await asyncio.sleep(0.1)
        assert not task.done()
        return task

    async def finish(task: asyncio.Task[list[Chunk]]) -> list[Chunk]:
        return await task

    before = AutoModelForCausalLM.from_pretrained(model.name_or_path).eval()
    task = call(begin())
    send(engine, call, changed(model).named_parameters())
    call(engine.release(old + 1, clear_kv=clear_kv))
    chunks = call(finish(task))
    tokens, logprobs = joined(chunks)
    assert chunks[-1].ending == "length"
    first, second = chunks[-1].spans
    assert (first.version, second.version) == (old, old + 1)
    assert (first.kv_version, second.kv_version) == (old, old + 1 if clear_kv else old)
    measured = torch.tensor(logprobs)
    theirs = reference_logprobs(before, [*LONG, *tokens], len(LONG))
    assert (theirs - measured)[: first.length].abs().max() < 1e-4
    ours = reference_logprobs(model, [*LONG, *tokens], len(LONG))
    off = (ours - measured)[first.length :].abs().max()
    # With their keys and values from the old weights they are neither policy's own.
    assert off < 1e-4 if clear_kv else off > 1e-3
    # A prompt that comes later reads nothing of the old weights.
    tokens, logprobs = joined(call(stream(engine, LONG, n=20)))
    ours = reference_logprobs(model, [*LONG, *tokens], len(LONG))
    assert (ours - torch.tensor(logprobs)).abs().max() < 1e-4


def test_a_held_engine_scores_and_what_goes_on_meanwhile_is_labelled(
    synced: Running, model: Any
) -> None:
    engine, call = synced
    old = engine.version
    tokens = list(range(2, 60))

    def assert_scored() -> None:
        [values] = call(engine.score([tokens]))
        expected = reference_logprobs(model, tokens, 1)
        assert (expected - torch.tensor(values)).abs().max() < 1e-4

    call(engine.hold())
    assert_scored()
    call(engine.release(old))

    async def begin() -> asyncio.Task[list[Chunk]]:
        task = asyncio.create_task(stream(engine, n=240))
        await asyncio.sleep(0.05)
        await engine.hold(keep=True)
        return task

    async def end(task: asyncio.Task[list[Chunk]]) -> list[Chunk]:
        await engine.hold()
        return await task

    task = call(begin())
    send(engine, call, changed(model).named_parameters())
    assert_scored()
    chunks = call(end(task))
    joined(chunks)
    assert {s.version for s in chunks[-1].spans} <= {old, old + 1}
    assert chunks[-1].spans[0].kv_version == old
    call(engine.release(old + 1))


def test_weights_are_refused_while_it_generates(synced: Running, model: Any) -> None:
    engine, call = synced
    with pytest.raises(WeightSyncError, match="hold it first"):
        send(engine, call, model.named_parameters())


def test_an_engine_that_sleeps_when_held_keeps_no_requests() -> None:
    engine = VLLMEngine(sleep_level=1)
    with pytest.raises(EngineError, match="sleep_level=1 gives the memory away"):
        asyncio.run(engine.hold(keep=True))
