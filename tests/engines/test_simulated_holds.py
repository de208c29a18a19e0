"""Holds on the simulated engine: nothing is lost, and every token is labelled with what made it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.engines.engine import (
    Chunk,
    Decoding,
    EngineSpec,
    GenerationRequest,
    Load,
    Span,
)
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import (
    Faults,
    LengthModel,
    StepTime,
    simulate_token,
)
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.errors import ConfigurationError, EngineError

VOCAB, STOP = 50, 3


def request(name: str, seed: int, response: Sequence[int] = (), limit: int = 40):
    return GenerationRequest(
        request_id=name,
        token_ids=(10, seed, *response),
        max_new_tokens=limit - len(response),
        decoding=Decoding(stop_token_ids=(STOP,)),
        seed=seed,
    )


def check_labels(engine, asked: GenerationRequest, chunks: list[Chunk]) -> None:
    """A stream's tokens and log-probs are those of its spans, and no label is too new."""
    spans = chunks[-1].spans
    made = [label for span in spans for label in [(span.version, span.kv_version)] * span.length]
    prefix, told = list(asked.token_ids), []
    for chunk in chunks:
        told += [(chunk.version, *pair) for pair in zip(chunk.token_ids, chunk.logprobs)]  # noqa: B905
    assert len(told) == len(made)
    for (label, token, logprob), (version, kv_version) in zip(told, made, strict=True):
        assert (token, logprob) == simulate_token(
            version,
            kv_version,
            prefix,
            asked.seed,
            vocab_size=VOCAB,
            stop=STOP,
            mean=engine.lengths.mean(asked.seed),
        )
        assert label <= version >= kv_version
        prefix.append(token)
    assert all(not chunk.spans and chunk.ending is None for chunk in chunks[:-1])


async def respond(engine, seed: int) -> list[int]:
    """Ask until the response is whole, as often as holds end the stream."""
    response: list[int] = []
    for attempt in range(10**6):
        asked = request(f"{seed}-{attempt}", seed, response)
        async with aclosing(engine.stream(asked)) as stream:
            chunks = [chunk async for chunk in stream]
        check_labels(engine, asked, chunks)
        response += [token for chunk in chunks for token in chunk.token_ids]
        if chunks[-1].ending != "held":
            return response
    raise AssertionError


@settings(max_examples=60, deadline=None)
@given(
    swaps=st.lists(
        st.tuples(st.integers(0, 70), st.booleans(), st.booleans(), st.integers(0, 2)),
        max_size=12,
    ),
    interval=st.sampled_from([1, 2, 8]),
    slots=st.integers(1, 6),
    faults=st.sampled_from([Faults(), Faults(empty_chunk_rate=0.2, late_finish_rate=0.5)]),
)
def test_labels_under_fire(swaps, interval, slots, faults):
    """Weights are swapped at any moment, with requests kept or ended, and KV kept or cleared."""
    loop = VirtualClockLoop()

    async def fire():
        engine = SimulatedEngine(LengthModel(12.0, 0.5), StepTime(1.0, 0.0), faults, interval)
        await engine.start(EngineSpec("none", slots, 60, VOCAB))
        await engine.release(0)
        responses = [asyncio.create_task(respond(engine, seed)) for seed in range(6)]
        for halves, keep, clear_kv, rise in swaps:
            await asyncio.sleep(halves / 2)  # between two steps, or at one
            await engine.hold(keep=keep)
            before = engine.tokens_made
            await asyncio.sleep(5.0)
            assert engine.tokens_made == before
            await engine.release(engine.version + rise, clear_kv=clear_kv)
        tokens = sum(map(len, await asyncio.gather(*responses)))
        assert tokens == engine.tokens_made
        assert engine.load() == Load(0, 0)
        await engine.close()

    try:
        loop.run_until_complete(fire())
    finally:
        loop.close()


async def kept_over(*, keep: bool, clear_kv: bool) -> list[Chunk]:
    """One response with a swap after five tokens, and its first stream's spans."""
    engine = SimulatedEngine(LengthModel(1e6, 0.0), StepTime(1.0, 0.0), stream_interval=4)
    await engine.start(EngineSpec("none", 1, 60, VOCAB))
    await engine.release(2)
    asked = request("r", 1)

    async def swap():
        await asyncio.sleep(5.5)
        await engine.hold(keep=keep)
        await engine.release(3, clear_kv=clear_kv)

    swapping = asyncio.create_task(swap())
    async with aclosing(engine.stream(asked)) as stream:
        chunks = [chunk async for chunk in stream]
    await swapping
    await engine.close()
    return chunks


@pytest.mark.parametrize(
    ("keep", "clear_kv", "spans"),
    [
        (True, False, (Span(5, 2, 2), Span(35, 3, 2))),
        (True, True, (Span(5, 2, 2), Span(35, 3, 3))),
        (False, False, (Span(5, 2, 2),)),
        (False, True, (Span(5, 2, 2),)),
    ],
)
def test_what_a_swap_makes_of_versions(loop, keep, clear_kv, spans):
    chunks = loop.run_until_complete(kept_over(keep=keep, clear_kv=clear_kv))
    assert chunks[-1].spans == spans
    assert chunks[-1].ending == ("length" if keep else "held")
    # The fifth token was unread: kept, it comes under the lower of two versions; ended, at once.
    assert [len(chunk.token_ids) for chunk in chunks[:2]] == [4, 4 if keep else 1]
    assert [chunk.version for chunk in chunks[:2]] == [2, 2]


def test_it_is_held_after_its_start_and_requests_wait(loop):
    async def waiting():
        engine = SimulatedEngine()
        await engine.start(EngineSpec("none", 1, 60, VOCAB))
        response = asyncio.create_task(respond(engine, 0))
        await asyncio.sleep(100.0)
        assert engine.tokens_made == 0
        assert engine.load() == Load(1, 0)
        await engine.release(7)
        assert await response
        await engine.close()
        return engine.version

    assert loop.run_until_complete(waiting()) == 7


def test_a_hold_does_not_wait_for_readers(loop):
    async def unread():
        engine = SimulatedEngine(stream_interval=8)
        await engine.start(EngineSpec("none", 1, 60, VOCAB))
        await engine.release(0)
        async with aclosing(engine.stream(request("r", 5))) as stream:
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            await engine.hold()
            last = await reading
        await engine.close()
        return last

    last = loop.run_until_complete(unread())
    assert last.ending == "held"
    assert len(last.token_ids) == 2


def test_versions_do_not_fall_and_only_a_held_engine_is_released(loop):
    async def refused():
        engine = SimulatedEngine()
        with pytest.raises(EngineError, match="not running"):
            await engine.hold()
        await engine.start(EngineSpec("none", 1, 60, VOCAB))
        await engine.release(4)
        with pytest.raises(EngineError, match="version 5: it must be held, and at version 4"):
            await engine.release(5)
        await engine.hold()
        with pytest.raises(EngineError, match="release of version 3"):
            await engine.release(3)
        await engine.start(EngineSpec("none", 1, 60, VOCAB))
        assert engine.version == 0
        await engine.close()

    loop.run_until_complete(refused())


def test_an_interval_of_no_tokens_is_refused():
    with pytest.raises(ConfigurationError, match=r"stream_interval=0 must be at least 1"):
        SimulatedEngine(stream_interval=0)
