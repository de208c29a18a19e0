"""Weights on two real servers: they arrive at both, or it is an error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from copris_testing import reference_logprobs
from responses import LONG, assert_made_by, generate, several
from synced import changed, sync

from copris_lightning import VLLMServerEngine
from copris_lightning.errors import WeightSyncError

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers' boot

Connected = tuple[VLLMServerEngine, Callable[..., Any]]


def test_after_a_sync_both_servers_compute_with_the_new_weights(
    connected: Connected, model: Any
) -> None:
    engine, call = connected
    sequences = [list(range(2, 40)), [5, 6, 7, 8, 9]]
    for version in (2, 3):
        before = [call(server.score(sequences[0])) for server in engine.servers]
        sync(engine, call, changed(model).named_parameters(), version)
        assert engine.version == version
        for server, old in zip(engine.servers, before, strict=True):
            new = torch.tensor(call(server.score(sequences[0])))
            assert (new - torch.tensor(old)).abs().max() > 1e-2
            assert (new - reference_logprobs(model, sequences[0], 1)).abs().max() < 1e-4
        scores = call(engine.score(sequences))
        for tokens, values in zip(sequences, scores, strict=True):
            assert (torch.tensor(values) - reference_logprobs(model, tokens, 1)).abs().max() < 1e-4
        # The same prompt as before: prefixes cached under the old weights must be gone.
        assert_made_by(model, call(several(engine, 4, LONG, n=20)), LONG)


def test_a_sync_right_after_aborts_is_clean(connected: Connected, model: Any) -> None:
    engine, call = connected

    async def abort() -> None:
        tasks = [asyncio.create_task(generate(engine, LONG, n=100)) for _ in range(12)]
        await asyncio.sleep(random.uniform(0.0, 0.2))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await engine.hold()

    for version in range(2, 6):
        call(abort())
        sync(engine, call, changed(model).named_parameters(), version)
        assert_made_by(model, call(several(engine, 2, LONG, n=20)), LONG)


def test_a_mismatch_is_explained_for_each_server(connected: Connected, model: Any) -> None:
    engine, call = connected
    transport = engine.transport(0, call)
    explanation = transport.explain(lambda: iter(list(model.named_parameters())))
    assert explanation.count("the engine has what was sent") == 2
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    explanation = transport.explain(lambda: iter(list(model.named_parameters())))
    transport.close()
    for url in engine.urls:
        found = f"{url}: the trainer's weights are no longer what was sent: model.layers.1.mlp.down"
        assert found in explanation


def test_weights_that_do_not_fit_are_an_error(connected: Connected, model: Any) -> None:
    engine, call = connected
    with pytest.raises(WeightSyncError, match=r"http://127.* could not load the weights"):
        sync(engine, call, [("model.layers.9.nonsense", torch.zeros(2))])
    assert engine.version == 1
    sync(engine, call, model.named_parameters(), 2)
    assert_made_by(model, call(several(engine, 4)))
