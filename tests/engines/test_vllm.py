"""The real engine: log-probs, resumption, concurrency and weight sync on vLLM's CPU build."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from copris_testing import SomePrompts, reference_logprobs
from responses import STOP, generate
from synced import sync
from transformers import AutoModelForCausalLM, AutoTokenizer

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.sampling import Sampling
from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptStream
from copris_lightning.engines.engine import Decoding, Engine, EngineSpec, Load
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.task import Task

Running = tuple[VLLMEngine, Callable[..., Any]]


@pytest.fixture
def synced(running_vllm: Running, model: Any) -> Running:
    """The engine with the checkpoint's own weights."""
    engine, call = running_vllm
    sync(engine, call, model.named_parameters())
    return running_vllm


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logprobs_are_those_of_the_sampled_distribution(
    synced: Running, model: Any, temperature: float
) -> None:
    engine, call = synced
    prompt = (5, 6, 7, 8)
    ids, logprobs, reason = call(generate(engine, prompt, temperature=temperature))
    expected = reference_logprobs(model, [*prompt, *ids], len(prompt), temperature)
    assert len(ids) == len(logprobs) == 60
    assert reason == "length"
    assert (expected - torch.tensor(logprobs)).abs().max() < 1e-5


def test_score_is_at_temperature_one(synced: Running, model: Any) -> None:
    engine, call = synced
    sequences = [[5, 6, 7, 8, 9], list(range(2, 60)), [5, 6]]
    scores = call(engine.score(sequences))
    for tokens, values in zip(sequences, scores, strict=True):
        expected = reference_logprobs(model, tokens, 1)
        assert len(values) == len(tokens) - 1
        assert (expected - torch.tensor(values)).abs().max() < 1e-5


def test_a_stop_token_ends_the_response_and_is_part_of_it(synced: Running) -> None:
    engine, call = synced
    ids, logprobs, reason = call(generate(engine, (5, 6), n=200, stop=tuple(range(50))))
    assert reason == "stop"
    assert ids[-1] < 50
    assert all(token >= 50 for token in ids[:-1])
    assert len(ids) == len(logprobs)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.engines)])
def test_after_a_sync_the_engine_computes_with_the_new_weights(
    running_vllm: Running, model: Any, tied: bool, request: pytest.FixtureRequest
) -> None:
    if not tied:
        running_vllm = request.getfixturevalue("running_untied_vllm")
        path = request.getfixturevalue("untied_checkpoint")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine, call = running_vllm
    # The same prompt before and after, longer than a block of the KV cache: prefixes cached under
    # the old weights must be gone.
    prompt = tuple(2 + i % 90 for i in range(140))
    for version in range(engine.version + 1, engine.version + 3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        sync(engine, call, model.named_parameters(), version)
        ids, logprobs, _ = call(generate(engine, prompt))
        expected = reference_logprobs(model, [*prompt, *ids], len(prompt))
        assert engine.version == version
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4


@pytest.fixture
def running_untied_vllm(untied_checkpoint: Path, cpu_engine_args: dict[str, Any]) -> Any:
    """A second engine, for a model with an output head of its own."""
    from copris_lightning.rollout.loop_thread import LoopThread

    engine = VLLMEngine(cpu_engine_args)
    loop = LoopThread(engine.new_event_loop)
    try:
        loop.call(engine.start(EngineSpec(str(untied_checkpoint), 4, 257, vocab_size=98)))
        yield engine, loop.call
    finally:
        loop.call(engine.close())
        loop.close()


def test_a_mismatch_is_explained_by_what_the_engine_has(synced: Running, model: Any) -> None:
    engine, call = synced
    transport = engine.transport(0, call)
    try:
        explanation = transport.explain(lambda: iter(list(model.named_parameters())))
        assert "the engine has what was sent" in explanation
        assert "its dtype is float32" in explanation
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        explanation = transport.explain(lambda: iter(list(model.named_parameters())))
    finally:
        transport.close()
    assert explanation.endswith("no longer what was sent: model.layers.1.mlp.down_proj.weight")


def test_a_sync_without_one_of_the_weights_is_an_error(synced: Running, model: Any) -> None:
    engine, call = synced
    for left_out, found in (
        ("model.layers.0.self_attn.k_proj.weight", "sent for model.layers.0.self_attn.qkv_proj"),
        ("model.norm.weight", "nothing was sent for its model.norm.weight"),
    ):
        weights = [(n, p) for n, p in model.named_parameters() if n != left_out]
        with pytest.raises(WeightSyncError, match=f"did not arrive .*{found}"):
            sync(engine, call, weights)
    sync(engine, call, model.named_parameters())


def test_weights_that_do_not_fit_are_an_error(synced: Running, model: Any) -> None:
    engine, call = synced
    with pytest.raises(WeightSyncError, match="did not take the weights"):
        sync(engine, call, [("model.layers.9.nonsense", torch.zeros(2))])
    # The engine still works, with weights that are known.
    sync(engine, call, model.named_parameters())


def new_scheduler(
    engine: Engine, checkpoint: Path, *, temperature: float, events: list[Event], **sizes: Any
) -> RolloutScheduler:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encode = PromptEncoder(tokenizer, max_prompt_tokens=32, key="prompts")

    async def score(text: str, prompt: Any) -> float:
        return float(len(text) % 2)

    buffer = CarryOverBuffer(max_new_tokens=100, stop_token_ids=[STOP], **sizes)
    task = Task(
        PromptStream(SomePrompts(), encode),
        score,
        tokenizer.decode,
        Decoding(Sampling(temperature)),
        name=f"test-{random.random()}",
    )
    return RolloutScheduler(SharedEngine(engine, buffer.limit), buffer, task, events.append)


def test_in_flight_equals_the_cap_on_the_real_engine(
    synced: Running, tiny_checkpoint: Path
) -> None:
    engine, call = synced
    events: list[Event] = []
    scheduler = new_scheduler(
        engine,
        tiny_checkpoint,
        temperature=1.0,
        events=events,
        limit=12,
        group_size=2,
        batch_groups=4,
    )
    for taken in (0, 4, 8):
        begin = len(events)
        call(scheduler.take())
        filled = next(i for i in range(begin, len(events)) if events[i].in_flight == 12)
        assert all(e.kind in ("start", "resume") for e in events[begin:filled])
        # The last reward of the batch ends the stage; nothing is started for it any more.
        scores = [i for i, e in enumerate(events) if e.kind == "score"]
        groups = [events[i].key[0] for i in scores]
        complete = [i for n, i in enumerate(scores) if groups[: n + 1].count(groups[n]) == 2]
        ended = complete[taken + 3]
        assert {e.in_flight for e in events[filled:ended]} == {12}
        assert max(e.in_flight for e in events) == 12
        assert scheduler.buffer.in_flight == 0
    assert any(e.kind == "resume" for e in events)
    call(scheduler.close())


def test_greedy_decoding_cut_anywhere_equals_uncut(synced: Running, tiny_checkpoint: Path) -> None:
    engine, call = synced
    events: list[Event] = []
    scheduler = new_scheduler(
        engine,
        tiny_checkpoint,
        temperature=0.0,
        events=events,
        limit=8,
        group_size=1,
        batch_groups=8,
    )
    rng = random.Random(0)

    async def collect_with_cuts() -> Any:
        while True:
            stage = asyncio.create_task(scheduler.take())
            done, _ = await asyncio.wait([stage], timeout=rng.uniform(0.005, 0.03))
            if done:
                return stage.result()[0]
            stage.cancel()
            await asyncio.wait([stage])

    groups = call(collect_with_cuts())
    assert sum(e.kind == "resume" for e in events) > 8
    call(engine.release(engine.version))
    for group in groups:
        trajectory = group.trajectories[0]
        uncut, _, _ = call(
            generate(engine, trajectory.prompt, n=100, temperature=0.0, stop=(STOP,))
        )
        assert trajectory.tokens.tolist() == uncut
    call(scheduler.close())


def test_an_aborted_request_leaves_nothing_behind(synced: Running) -> None:
    engine, call = synced

    async def abort_some() -> Load | None:
        tasks = [asyncio.create_task(generate(engine, (5, i), n=240)) for i in range(8)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        return engine.load()

    assert call(abort_some()) == Load(0, 0)


def test_requests_that_vllm_refuses_are_named(synced: Running) -> None:
    engine, call = synced
    with pytest.raises(EngineError, match="refused request"):
        call(generate(engine, tuple(range(2, 90)) * 3, n=10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_paralel_size": 2}, "tensor_paralel_size=2: vLLM .* has no such engine argument"),
        ({"max_num_seqs": 4}, "max_num_seqs=4 is below the 16 that flow.cap"),
        ({"max_model_len": 64}, "max_model_len=64 is below the 257"),
    ],
)
def test_engine_arguments_are_checked_before_booting(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VLLMEngine(arguments).validate(EngineSpec("x", 16, 257, vocab_size=98))


def test_engine_arguments_of_this_package_cannot_be_overridden() -> None:
    with pytest.raises(ConfigurationError, match=r"logprobs_mode='raw_logprobs' is set by"):
        VLLMEngine({"logprobs_mode": "raw_logprobs"})
