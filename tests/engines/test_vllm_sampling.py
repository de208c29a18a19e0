"""Stop strings, greedy evaluation and special tokens on the real engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from copris_testing import SomePrompts
from synced import sync
from transformers import AutoTokenizer

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.sampling import Sampling
from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptStream
from copris_lightning.engines.engine import Chunk, Decoding, EngineSpec, GenerationRequest, Load
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.decoding import ResponseDecoder
from copris_lightning.rollout.scheduler import RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.stops import StopStrings
from copris_lightning.rollout.task import Task

Running = tuple[VLLMEngine, Callable[..., Any]]
STOP = 1  # the character tokenizer's end of sequence
PROMPT = (5, 6, 7, 8)


@pytest.fixture
def synced(running_vllm: Running, model: Any) -> Running:
    """The engine with the checkpoint's own weights."""
    engine, call = running_vllm
    sync(engine, call, model.named_parameters())
    return running_vllm


async def chunks_of(engine: VLLMEngine, decoding: Decoding, *, n: int, seed: int) -> list[Chunk]:
    request = GenerationRequest(f"test-{random.random()}", PROMPT, n, decoding, seed)
    async with aclosing(engine.stream(request)) as chunks:
        return [chunk async for chunk in chunks]


def test_greedy_decoding_takes_the_most_likely_token_and_asks_for_no_logprobs(
    synced: Running, model: Any
) -> None:
    engine, call = synced
    made = []
    for seed in (0, 1):
        decoding = Decoding(Sampling(0.0, top_p=0.9, top_k=5), logprobs=False)
        chunks = call(chunks_of(engine, decoding, n=40, seed=seed))
        assert all(chunk.logprobs is None for chunk in chunks)
        assert chunks[-1].ending == "length"
        made.append([token for chunk in chunks for token in chunk.token_ids])
    assert made[0] == made[1]
    sequence = list(PROMPT)
    with torch.no_grad():
        for token in made[0]:
            scores = model(torch.tensor([sequence])).logits[0, -1]
            assert scores.max() - scores[token] < 1e-4
            sequence.append(token)


def test_top_k_and_top_p_narrow_the_choice(synced: Running, model: Any) -> None:
    engine, call = synced
    with torch.no_grad():
        scores = model(torch.tensor([PROMPT])).logits[0, -1]
    likely = scores.argsort(descending=True).tolist()
    first = [
        {
            call(chunks_of(engine, Decoding(sampling), n=1, seed=seed))[0].token_ids[0]
            for seed in range(30)
        }
        for sampling in (Sampling(top_k=3), Sampling(top_p=1e-6), Sampling())
    ]
    assert first[0] <= set(likely[:3])
    assert first[1] == {likely[0]}
    assert len(first[2]) > 3


def test_a_stop_string_ends_responses_over_resumes_and_nothing_runs_on(
    synced: Running, tiny_checkpoint: Path
) -> None:
    engine, call = synced
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    decode = ResponseDecoder(tokenizer, ends=(STOP,))
    strings = tuple(a + b for a in "0123456789abcdefghijkl" for b in "mnopqrstuvwxyzABCDEFGHI")
    seen: list[str] = []

    async def score(text: str, prompt: Any) -> float:
        seen.append(text)
        return float(len(text) % 2)

    buffer = CarryOverBuffer(
        limit=12, group_size=2, batch_groups=3, max_new_tokens=100, stop_token_ids=[STOP]
    )
    encode = PromptEncoder(tokenizer, max_prompt_tokens=32, key="prompts")
    task = Task(
        PromptStream(SomePrompts(), encode),
        score,
        decode,
        stops=StopStrings(strings, decode.verbatim),
        name=f"test-{random.random()}",
    )
    scheduler = RolloutScheduler(SharedEngine(engine, 12), buffer, task)
    groups, received, dropped = [], 0, 0
    for _ in range(8):
        some, stats = call(scheduler.take())
        groups += some
        received += stats.tokens
        dropped += stats.dropped_tokens
        assert engine.load() == Load(0, 0)
    trajectories = [t for group in groups for t in group.trajectories]
    by_string = 0
    for trajectory in trajectories:
        texts = [
            decode.verbatim(trajectory.tokens[:end])
            for end in range(1, trajectory.response_length + 1)
        ]
        ends = [any(string in text for string in strings) for text in texts]
        assert not any(ends[:-1])
        if ends[-1] and trajectory.tokens[-1] != STOP:
            by_string += 1
            assert trajectory.finish_reason == "stop"
            # The reward sees the string (not the padding that an untrained model begins with).
            text = decode(trajectory.tokens)
            assert text in seen
            assert any(string in text for string in strings)
    assert by_string > len(trajectories) / 3
    inside = sum(t.response_length for t in scheduler.buffer.trajectories())
    assert received == dropped + inside + sum(t.response_length for t in trajectories)
    call(scheduler.close())


def test_special_tokens_that_were_generated_are_text(
    synced: Running, tiny_checkpoint: Path
) -> None:
    engine, call = synced
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    letters = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    # A special token wherever the model is likely to go: half of the vocabulary.
    tokenizer.add_special_tokens({"additional_special_tokens": letters[2:50]})
    chunks = call(chunks_of(engine, Decoding(stop_token_ids=(STOP,)), n=60, seed=0))
    ids = [token for chunk in chunks for token in chunk.token_ids]
    kept = ResponseDecoder(tokenizer, ends=(STOP,))(ids)
    stripped = ResponseDecoder(tokenizer, ends=(STOP,), special_tokens="strip")(ids)
    assert len(kept) > len(stripped) > 0
    assert not set(stripped) & set("".join(letters[2:50]))


def test_trust_is_the_modules_setting(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"change trust_remote_code"):
        VLLMEngine({"trust_remote_code": True})
    assert EngineSpec(str(tiny_checkpoint), 1, 1, 98).trust_remote_code is False
