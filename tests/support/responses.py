"""Responses of an engine, asked for one by one, for tests that have no scheduler."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import torch
from copris_testing import reference_logprobs

from copris_lightning.core.sampling import Sampling
from copris_lightning.engines.engine import Chunk, Decoding, Engine, GenerationRequest

PROMPT = (5, 6, 7, 8)
LONG = tuple(2 + i % 90 for i in range(140))  # more than a block of the KV cache
STOP = 1  # the character tokenizer's end of sequence

Response = tuple[list[int], list[float], str | None]
"""Tokens, their log-probs and why it ended."""


async def stream(
    engine: Engine,
    tokens: tuple[int, ...],
    *,
    n: int = 60,
    temperature: float = 1.0,
    stop: tuple[int, ...] = (),
    seed: int = 0,
    on_chunk: Callable[[], None] = lambda: None,
) -> list[Chunk]:
    """All chunks of a response."""
    name = f"test-{random.random()}"
    request = GenerationRequest(name, tokens, n, Decoding(Sampling(temperature), stop), seed)
    chunks: list[Chunk] = []
    async for chunk in engine.stream(request):
        chunks.append(chunk)
        on_chunk()
    assert [chunk.ending is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    return chunks


async def generate(engine: Engine, tokens: tuple[int, ...], **settings: Any) -> Response:
    """A response; the settings are those of :func:`stream`."""
    chunks = await stream(engine, tokens, **settings)
    ids = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [value for chunk in chunks for value in chunk.logprobs or ()]
    return ids, logprobs, chunks[-1].ending


async def several(
    engine: Engine, count: int, prompt: tuple[int, ...] = PROMPT, **settings: Any
) -> list[Response]:
    """Some at once."""
    return await asyncio.gather(*(generate(engine, prompt, **settings) for _ in range(count)))


def assert_made_by(
    model: Any,
    responses: list[Response],
    prompt: tuple[int, ...] = PROMPT,
    temperature: float = 1.0,
) -> None:
    """The log-probs are those of a transformers model."""
    for ids, logprobs, _ in responses:
        expected = reference_logprobs(model, [*prompt, *ids], len(prompt), temperature)
        assert len(ids) == len(logprobs)
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4
