"""A simulated KV cache: what does not fit waits, who came last is put back and computed again."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from copris_lightning.core.cap import Load
from copris_lightning.engines.engine import Chunk, Decoding, EngineSpec, GenerationRequest
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import KVCache, LengthModel, StepTime
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.errors import ConfigurationError

STEP_S, PREFIX_S = 1.0, 0.01


def answers(tokens: int, lengths: list[int]) -> tuple[list[list[Chunk]], list[float], list[Load]]:
    """Responses of so many tokens to prompts of two, from a cache; when each ended, and the loads
    that were told then."""
    engine = SimulatedEngine(
        LengthModel(), StepTime(STEP_S, 0.0), kv_cache=KVCache(tokens, PREFIX_S)
    )
    ended, loads = [], []

    async def one(name: str, length: int) -> list[Chunk]:
        asked = GenerationRequest(name, (10, 11), length, Decoding(), seed=7)
        async with aclosing(engine.stream(asked)) as chunks:
            made = [chunk async for chunk in chunks]
        ended.append(asyncio.get_running_loop().time())
        loads.append(engine.load())
        return made

    async def run() -> list[list[Chunk]]:
        await engine.start(EngineSpec("none", 8, 200, 50))
        await engine.release(0)
        return await asyncio.gather(*(one(f"r{i}", n) for i, n in enumerate(lengths)))

    loop = VirtualClockLoop()
    made = loop.run_until_complete(run())
    loop.close()
    return made, ended, loads


def test_with_room_for_all_it_costs_the_prompts() -> None:
    _, ended, loads = answers(1000, [4, 4])
    assert ended == pytest.approx([4 * STEP_S + 4 * PREFIX_S] * 2)
    # Each has a place for one token more.
    assert loads[0] == Load(2, 0, pytest.approx(2 * (2 + 4 + 1) / 1000), 0)


def test_who_came_last_is_put_back_and_computed_again() -> None:
    made, ended, loads = answers(10, [5, 5])
    # Both fit up to five tokens each: after three steps the second one gives way, with three made.
    assert loads[0].preemptions == 1 == loads[1].preemptions
    assert loads[0] == Load(1, 1, pytest.approx(0.8), 1)
    assert ended[0] == pytest.approx(5 * STEP_S + 4 * PREFIX_S)
    # A slot is free once the end has been read, a step later.
    assert ended[1] == pytest.approx(ended[0] + 3 * STEP_S + 5 * PREFIX_S)
    alone = answers(1000, [5])[0][0]
    assert [[c.token_ids for c in chunks] for chunks in made] == [[c.token_ids for c in alone]] * 2


def test_one_that_does_not_fit_alone_runs_all_the_same() -> None:
    _, ended, loads = answers(3, [6, 1])
    assert len(ended) == 2
    assert loads[0].kv_usage == 1.0


def test_what_cannot_be_is_refused() -> None:
    for settings, says in (({"tokens": 0}, "tokens=0"), ({"tokens": 1, "prefix_s": -1.0}, "pref")):
        with pytest.raises(ConfigurationError, match=says):
            KVCache(**settings)
    with pytest.raises(ConfigurationError, match=r"^flow\.cap=\{least: 4, most: 8\} follows"):
        SimulatedEngine().validate(EngineSpec("none", 8, 200, 50, min_num_seqs=4))
