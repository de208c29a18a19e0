"""Holds on two real servers: no token is lost, and each bears the version that made it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from responses import LONG, PROMPT, Response, assert_made_by, several, stream
from synced import changed, send

from copris_lightning import VLLMServerEngine
from copris_lightning.core.segments import Span
from copris_lightning.engines.engine import Chunk

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers' boot

Connected = tuple[VLLMServerEngine, Callable[..., Any]]


def test_a_hold_at_any_moment_loses_no_token(connected: Connected, model: Any) -> None:
    """What the servers say they made, in spans, is what came, and goes on from there."""
    engine, call = connected
    rng = random.Random(0)

    async def cut() -> tuple[list[Response], int]:
        made: list[Response] = [([], [], "") for _ in range(12)]
        holds = 0
        while unfinished := [i for i, (ids, _, _) in enumerate(made) if len(ids) < 200]:
            tasks = [
                asyncio.create_task(stream(engine, (*PROMPT, *ids), n=200 - len(ids)))
                for ids in (made[i][0] for i in unfinished)
            ]
            await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 0.2)]))
            await engine.hold()
            for i, chunks in zip(unfinished, await asyncio.gather(*tasks), strict=True):
                new = [token for chunk in chunks for token in chunk.token_ids]
                assert chunks[-1].spans == ((Span(len(new), 1, 1),) if new else ())
                made[i][0].extend(new)
                made[i][1].extend(x for chunk in chunks for x in chunk.logprobs or ())
                holds += bool(new) and chunks[-1].ending == "held"
            await engine.release(1)
        return made, holds

    made, holds = call(cut())
    assert holds
    assert_made_by(model, made)


def test_a_kept_hold_tells_two_versions_apart(connected: Connected, model: Any) -> None:
    engine, call = connected

    async def begin() -> list[asyncio.Task[list[Chunk]]]:
        begun = asyncio.Event()
        tasks = [
            asyncio.create_task(stream(engine, PROMPT, n=250, on_chunk=begun.set)) for _ in range(8)
        ]
        await begun.wait()
        await engine.hold(keep=True)
        return tasks

    async def finish(tasks: list[asyncio.Task[list[Chunk]]]) -> list[list[Chunk]]:
        return await asyncio.gather(*tasks)

    mixed = False
    while not mixed:  # the loop may be so late that a response was whole before the hold
        old, new = engine.version, engine.version + 1
        assert new < 10
        tasks = call(begin())
        send(engine, call, changed(model).named_parameters())
        call(engine.release(new, clear_kv=False))
        for chunks in call(finish(tasks)):
            assert chunks[-1].ending == "length"
            assert sum(span.length for span in chunks[-1].spans) == 250
            labels = [(s.version, s.kv_version) for s in chunks[-1].spans]
            assert labels in ([(old, old)], [(old, old), (new, old)], [(new, old)])
            mixed |= len(labels) == 2
    # A prompt that comes later reads nothing of the old weights.
    assert_made_by(model, call(several(engine, 2, LONG, n=20)), LONG)
