"""Real workers load a checkpoint in parts, wherever it is cut, and prove that all of it came."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from copris_testing import reference_logprobs
from transformers import AutoModelForCausalLM

from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import EngineError, WeightSyncError
from copris_lightning.weights.files import FilesTransport
from copris_lightning.weights.transport import Receiver, Weights

Running = tuple[VLLMEngine, Callable[..., Any]]
LIMIT = 20_000
"""Bytes of a shard: q, k and v come in several, as do gate and up."""


class Interrupted:
    """An engine that fails at one of the shards, after some were loaded."""

    def __init__(self, engine: Receiver, at: int) -> None:
        self.engine = engine
        self.left = at

    async def begin_load(self) -> None:
        await self.engine.begin_load()

    async def load_shard(self, path: Path) -> None:
        self.left -= 1
        if self.left == 0:
            raise EngineError("it fell over")
        await self.engine.load_shard(path)

    async def end_load(self) -> None:
        await self.engine.end_load()

    async def load_adapter(self, folder: Path) -> None:
        await self.engine.load_adapter(folder)

    async def explain(self, paths: Sequence[Path]) -> str:
        return await self.engine.explain(paths)


@pytest.fixture
def changed(tiny_checkpoint: Path) -> Any:
    """The checkpoint's model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def weights_of(model: Any) -> Weights:
    return lambda: ((name, p.detach()) for name, p in model.named_parameters())


def largest_difference(running: Running, model: Any) -> float:
    """Between the engine's log-probs and the model's, after a release."""
    engine, call = running
    call(engine.release(engine.version + 1))
    tokens = [2 + i % 90 for i in range(140)]
    (scores,) = call(engine.score([tokens]))
    return float((reference_logprobs(model, tokens, 1) - torch.tensor(scores)).abs().max())


@pytest.mark.parametrize("limit", [1, LIMIT, 10**9])
def test_an_engine_computes_with_what_came_in_shards(
    running_vllm: Running, changed: Any, limit: int
) -> None:
    engine, call = running_vllm
    way = FilesTransport(engine, None, 0, call, shard_bytes=limit)
    call(engine.hold())
    way.send(weights_of(changed))
    assert largest_difference(running_vllm, changed) < 1e-4
    way.close()


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_load_that_broke_off_leaves_nothing_to_the_next(
    running_vllm: Running, changed: Any, at: int
) -> None:
    engine, call = running_vllm
    interrupted = Interrupted(engine, at)
    way = FilesTransport(interrupted, None, 0, call, shard_bytes=LIMIT)
    call(engine.hold())
    with pytest.raises(WeightSyncError, match="it fell over"):
        way.send(weights_of(changed))
    way.restore()
    assert interrupted.left < -9  # all shards once more
    assert largest_difference(running_vllm, changed) < 1e-4
    way.close()


def test_a_part_of_a_layer_that_no_shard_held_is_named(running_vllm: Running, changed: Any) -> None:
    engine, call = running_vllm
    way = FilesTransport(engine, None, 0, call, shard_bytes=LIMIT)
    call(engine.hold())
    left_out = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(WeightSyncError, match=r"sent for model\.layers\.0\.self_attn\.qkv_proj"):
        way.send(lambda: (item for item in weights_of(changed)() if item[0] != left_out))
    way.send(weights_of(changed))
    assert largest_difference(running_vllm, changed) < 1e-4
    way.close()
