"""Remote engines on two real servers: tokens, log-probs, aborts, weights, and servers that die."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from builders import small_data, small_module
from copris_testing import SomePrompts, reference_logprobs
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from served import Served
from some_rewards import ShareOfDigits
from synced import send, sync
from transformers import AutoModelForCausalLM

from copris_lightning import (
    SimulatedEngine,
    TrajectoryLedger,
    VLLMServerEngine,
    WeightSync,
)
from copris_lightning.core.buffer import CarryOverBuffer, Status
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.segments import Span
from copris_lightning.engines.engine import (
    Chunk,
    Decoding,
    Engine,
    EngineSpec,
    GenerationRequest,
)
from copris_lightning.errors import EngineError, WeightSyncError
from copris_lightning.rollout.loop_thread import LoopThread
from copris_lightning.rollout.scheduler import Event

pytestmark = pytest.mark.timeout(600)  # two servers boot at once on the cores that there are

Call = Callable[..., Any]
Connected = tuple[VLLMServerEngine, Call]
PROMPT = (5, 6, 7, 8)
LONG = tuple(2 + i % 90 for i in range(140))  # more than a block of the KV cache
STOP = 1  # the character tokenizer's end of sequence


@pytest.fixture(scope="module")
def servers(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Served]]:
    """Two servers; the last test kills them."""
    logs = tmp_path_factory.mktemp("servers")
    started = [Served(tiny_checkpoint, logs / f"{i}.log", core=i) for i in range(2)]
    try:
        for server in started:
            server.wait_until_ready()
        yield started
    finally:
        for server in started:
            server.end()


@pytest.fixture
def model(tiny_checkpoint: Path) -> Any:
    """The checkpoint in transformers; each call of ``changed`` makes it another policy."""
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


def changed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def connect(servers: list[Served], tiny_checkpoint: Path) -> Iterator[Callable[..., Connected]]:
    """Makes engines on both servers."""
    opened: list[tuple[VLLMServerEngine, LoopThread]] = []

    def make(**settings: Any) -> Connected:
        engine = VLLMServerEngine([server.url for server in servers], **settings)
        loop = LoopThread(engine.new_event_loop)
        opened.append((engine, loop))
        loop.call(engine.start(EngineSpec(str(tiny_checkpoint), 16, 257, vocab_size=98)))
        loop.call(engine.release(0))
        return engine, loop.call

    yield make
    for engine, loop in opened:
        loop.call(engine.close())
        loop.close()


@pytest.fixture
def synced(connect: Callable[..., Connected], model: Any) -> Connected:
    """An engine whose servers have the weights of ``model``."""
    engine, call = connect()
    sync(engine, call, model.named_parameters(), 1)
    return engine, call


async def generate(
    engine: Engine,
    tokens: tuple[int, ...],
    *,
    n: int = 60,
    temperature: float = 1.0,
    stop: tuple[int, ...] = (),
    seed: int = 0,
    on_chunk: Callable[[], None] = lambda: None,
) -> tuple[list[int], list[float], str | None]:
    request = GenerationRequest(
        f"test-{random.random()}", tokens, n, Decoding(Sampling(temperature), stop), seed
    )
    ids: list[int] = []
    logprobs: list[float] = []
    reason = None
    async for chunk in engine.stream(request):
        assert reason is None
        ids += chunk.token_ids
        logprobs += chunk.logprobs
        reason = chunk.ending
        on_chunk()
    return ids, logprobs, reason


async def several(
    engine: Engine, count: int, prompt: tuple[int, ...] = PROMPT, **settings: Any
) -> list[Any]:
    return await asyncio.gather(*(generate(engine, prompt, **settings) for _ in range(count)))


def assert_made_by(
    model: Any,
    responses: list[Any],
    prompt: tuple[int, ...] = PROMPT,
    temperature: float = 1.0,
) -> None:
    for ids, logprobs, _ in responses:
        expected = reference_logprobs(model, [*prompt, *ids], len(prompt), temperature)
        assert len(ids) == len(logprobs)
        assert (expected - torch.tensor(logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logprobs_are_those_of_the_sampled_distribution(
    synced: Connected, model: Any, temperature: float
) -> None:
    engine, call = synced
    responses = call(several(engine, 4, temperature=temperature))
    assert [(len(ids), reason) for ids, _, reason in responses] == [(60, "length")] * 4
    assert_made_by(model, responses, temperature=temperature)


def test_a_stop_token_ends_the_response_and_is_part_of_it(synced: Connected, model: Any) -> None:
    engine, call = synced
    response = call(generate(engine, PROMPT, n=200, stop=tuple(range(50))))
    ids, _, reason = response
    assert reason == "stop"
    assert ids[-1] < 50
    assert all(token >= 50 for token in ids[:-1])
    assert_made_by(model, [response])


def test_the_end_of_sequence_ends_nothing_unless_asked_for(synced: Connected) -> None:
    engine, call = synced
    responses = call(several(engine, 16, n=200))
    assert {reason for _, _, reason in responses} == {"length"}
    assert any(STOP in ids[:-1] for ids, _, _ in responses)


def test_requests_go_to_the_server_with_the_fewest(synced: Connected) -> None:
    engine, call = synced
    seen: list[list[int]] = []

    async def watch() -> None:
        await several(
            engine, 8, on_chunk=lambda: seen.append([s.in_flight for s in engine.servers])
        )

    call(watch())
    assert seen[0] == [4, 4]
    assert [server.in_flight for server in engine.servers] == [0, 0]


def test_seeded_requests_are_the_same_on_any_server(connect: Callable[..., Connected]) -> None:
    engine, call = connect(request_seeds=True)
    responses = call(several(engine, 4, seed=7))
    assert len({tuple(ids) for ids, _, _ in responses}) == 1
    assert call(generate(engine, PROMPT, seed=8))[0] != responses[0][0]


def test_an_aborted_request_is_not_generated_any_further(
    synced: Connected, servers: list[Served]
) -> None:
    engine, call = synced
    before = sum(server.metric("vllm:generation_tokens_total") for server in servers)

    async def abort_at_the_first_token() -> None:
        tasks: list[asyncio.Task[Any]] = []

        def abort() -> None:
            for task in tasks:
                task.cancel()

        tasks += [
            asyncio.create_task(generate(engine, (5, i), n=240, on_chunk=abort)) for i in range(48)
        ]
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)

    call(abort_at_the_first_token())
    assert [server.in_flight for server in engine.servers] == [0, 0]
    # So many take some seconds.
    deadline = time.monotonic() + 10
    while any(server.metric("vllm:num_requests_running") for server in servers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    after = sum(server.metric("vllm:generation_tokens_total") for server in servers)
    assert after - before < 0.5 * 48 * 240


def test_after_a_sync_both_servers_compute_with_the_new_weights(
    synced: Connected, model: Any
) -> None:
    engine, call = synced
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


def test_a_sync_right_after_aborts_is_clean(synced: Connected, model: Any) -> None:
    engine, call = synced

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


def test_a_mismatch_is_explained_for_each_server(synced: Connected, model: Any) -> None:
    engine, call = synced
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


async def stream(
    engine: Engine, tokens: tuple[int, ...], n: int, temperature: float
) -> list[Chunk]:
    name = f"test-{random.random()}"
    request = GenerationRequest(name, tokens, n, Decoding(Sampling(temperature)), seed=0)
    return [chunk async for chunk in engine.stream(request)]


def test_a_hold_at_any_moment_loses_no_token(synced: Connected) -> None:
    engine, call = synced
    rng = random.Random(0)

    async def cut(prompt: tuple[int, ...], uncut: list[int]) -> int:
        made: list[int] = []
        holds = 0
        while len(made) < len(uncut):
            left = len(uncut) - len(made)
            task = asyncio.create_task(stream(engine, (*prompt, *made), left, 0.0))
            await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 0.2)]))
            await engine.hold()
            chunks = await task
            new = [token for chunk in chunks for token in chunk.token_ids]
            whole = (Span(len(new), 1, 1),) if new else ()
            assert chunks[-1].spans == whole
            made += new
            holds += chunks[-1].ending == "held"
            await engine.release(1)
        assert made == uncut
        return holds

    holds = 0
    for i in range(3):
        prompt = (5, 6, 7, 2 + i)
        chunks = call(stream(engine, prompt, 100, 0.0))
        uncut = [token for chunk in chunks for token in chunk.token_ids]
        holds += call(cut(prompt, uncut))
    assert holds > 3


def test_a_kept_hold_tells_two_versions_apart(synced: Connected, model: Any) -> None:
    engine, call = synced

    async def begin() -> list[asyncio.Task[list[Chunk]]]:
        tasks = [asyncio.create_task(stream(engine, LONG, 100, 1.0)) for _ in range(4)]
        await asyncio.sleep(0.3)
        await engine.hold(keep=True)
        return tasks

    async def finish(tasks: list[asyncio.Task[list[Chunk]]]) -> list[list[Chunk]]:
        return await asyncio.gather(*tasks)

    tasks = call(begin())
    send(engine, call, changed(model).named_parameters())
    call(engine.release(2, clear_kv=False))
    for chunks in call(finish(tasks)):
        assert chunks[-1].ending == "length"
        assert sum(span.length for span in chunks[-1].spans) == 100
        assert [(s.version, s.kv_version) for s in chunks[-1].spans] == [(1, 1), (2, 1)]
    # A prompt that comes later reads nothing of the old weights.
    assert_made_by(model, call(several(engine, 2, LONG, n=20)), LONG)


def test_weights_that_do_not_fit_are_an_error(synced: Connected, model: Any) -> None:
    engine, call = synced
    with pytest.raises(WeightSyncError, match=r"http://127.* could not load the weights"):
        sync(engine, call, [("model.layers.9.nonsense", torch.zeros(2))])
    assert engine.version == 1
    sync(engine, call, model.named_parameters(), 2)
    assert_made_by(model, call(several(engine, 4)))


def test_requests_that_a_server_refuses_are_named(synced: Connected) -> None:
    engine, call = synced
    with pytest.raises(EngineError, match=r"http://127.* answers 400: The decoder prompt"):
        call(generate(engine, tuple(range(2, 90)) * 3, n=10))


@pytest.mark.usefixtures("synced")  # a server's first request takes long
def test_a_server_that_hangs_is_left_out_until_the_next_sync(
    connect: Callable[..., Connected], servers: list[Served], model: Any
) -> None:
    engine, call = connect(stall_timeout_s=6.0, connect_timeout_s=3.0)
    sync(engine, call, model.named_parameters(), 1)

    async def hang_in_the_middle() -> list[Any]:
        def hang() -> None:
            if all(server.in_flight for server in engine.servers):
                servers[0].signal(signal.SIGSTOP)

        return await several(engine, 8, n=200, on_chunk=hang)

    try:
        responses = call(hang_in_the_middle())
        assert "silent for 6 s" in (engine.servers[0].lost or "")
        # Nobody noticed: every response is whole, and its tokens are the policy's.
        assert [(len(ids), reason) for ids, _, reason in responses] == [(200, "length")] * 8
        assert_made_by(model, responses)
        sync(engine, call, changed(model).named_parameters(), 2)
        assert engine.servers[0].lost is not None
        assert_made_by(model, call(several(engine, 4)))
    finally:
        servers[0].signal(signal.SIGCONT)
    sync(engine, call, changed(model).named_parameters(), 3)
    assert [server.lost for server in engine.servers] == [None, None]
    for server in engine.servers:
        tokens = list(range(2, 40))
        values = torch.tensor(call(server.score(tokens)))
        assert (values - reference_logprobs(model, tokens, 1)).abs().max() < 1e-4


# -- whole runs ----------------------------------------------------------------------------

SIZES: dict[str, Any] = {"groups": 4, "max_new_tokens": 96}


class Reaper(L.Callback):
    """Kills the first server in the third stage, or soon after, and ends the second two later."""

    def __init__(self, servers: list[Served]) -> None:
        self.plan = list(zip(servers, (signal.SIGKILL, signal.SIGTERM), strict=True))
        self.next = 2
        self.stage = 0
        self.chunks = 0
        self.tokens = 0
        self.last = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.datamodule.observers.append(self.observe)

    def observe(self, event: Event) -> None:
        if event.kind == "deliver":
            self.stage, self.chunks = self.stage + 1, 0
        if event.kind == "chunk":
            self.tokens += event.tokens
            self.chunks += 1
            # Not every stage has many chunks: groups may be left over from the one before.
            if self.plan and self.stage >= self.next and self.chunks >= 20:
                server, number = self.plan.pop(0)
                self.next = self.stage + 2
                server.signal(number)
                self.last = time.monotonic()


def fit(
    checkpoint: Path,
    directory: Path,
    engine: Engine,
    *,
    steps: int,
    callbacks: list[L.Callback],
    **settings: Any,
) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=CSVLogger(directory),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=[WeightSync(), TrajectoryLedger(), *callbacks],
    )
    module = small_module(checkpoint, lr=0.5)
    data = small_data(
        checkpoint, engine, prompts=SomePrompts(200), reward=ShareOfDigits(), cap=20, **SIZES
    )
    trainer.fit(module, datamodule=data, **settings)


def ledger(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.rglob("batch_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_run_survives_its_servers_down_to_the_last_and_then_keeps_its_buffer(
    tiny_checkpoint: Path, tmp_path: Path, servers: list[Served]
) -> None:
    engine = VLLMServerEngine([server.url for server in servers], stall_timeout_s=10.0)
    reaper = Reaper(servers)
    callbacks = [reaper, OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(EngineError, match=r"no server of engine\.urls") as error:
        fit(tiny_checkpoint, tmp_path, engine, steps=50, callbacks=callbacks)
    assert time.monotonic() - reaper.last < 60
    assert all(url in str(error.value) for url in engine.urls)
    for server in servers:  # neither SIGKILL nor SIGTERM leaves an engine behind
        server.assert_nothing_left()

    # Two stages on both servers, one in which one died, one on the other alone.
    records = ledger(tmp_path)
    assert reaper.stage >= 4
    assert len(records) == reaper.stage * 8
    state = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["RolloutDataModule"]
    buffer = CarryOverBuffer(
        limit=20, group_size=2, batch_groups=4, max_new_tokens=96, stop_token_ids=[STOP]
    )
    buffer.load_state_dict(state["buffer"])
    kept = list(buffer.trajectories())
    names = [(r["prompt_id"], r["sample"]) for r in records]
    names += [(t.prompt_id, t.sample) for t in kept]
    assert len(set(names)) == len(names) == buffer.admitted
    assert buffer.count(Status.CARRIED_OVER) == 20
    received = sum(r["response_tokens"] for r in records) + sum(t.response_length for t in kept)
    assert received == reaper.tokens
    for columns in (t.logprobs for t in kept if t.tokens):
        ours = torch.tensor(columns.get("trainer", ()))
        theirs = torch.tensor(columns["engine"])[: len(ours)]
        assert not len(ours) or (ours - theirs).abs().max() < 1e-4

    # Told to, a run goes on from there, with any engine: nothing is trained on twice, and what was
    # generated before is.
    again: list[L.Callback] = [OnExceptionCheckpoint(tmp_path)]
    steps = reaper.stage + 4
    options: dict[str, Any] = {"steps": steps, "callbacks": again, "weights_only": True}
    fit(tiny_checkpoint, tmp_path, SimulatedEngine(), ckpt_path="last", **options)
    records = ledger(tmp_path)
    assert len(records) == steps * 8
    trained = {(r["prompt_id"], r["sample"]): r["segments"][0] for r in records}
    assert len(trained) == len(records)
    begun = {(t.prompt_id, t.sample): t.segments[0] for t in kept if t.segments}
    finished = [name for name in begun if name in trained]
    assert len(finished) > len(begun) // 2
    for name in finished:
        assert trained[name]["version"] == begun[name].version
        assert trained[name]["tokens"] >= begun[name].length
