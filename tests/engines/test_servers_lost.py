"""Real servers that hang and die; in the last test both do, so no other file may follow."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from builders import small_data, small_module
from copris_testing import SomePrompts, reference_logprobs
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from responses import STOP, assert_made_by, several
from served import Served
from some_rewards import ShareOfDigits
from synced import changed, sync

from copris_lightning import (
    SimulatedEngine,
    TrajectoryLedger,
    VLLMServerEngine,
    WeightSync,
)
from copris_lightning.core.buffer import CarryOverBuffer, Status
from copris_lightning.core.estimator.corrections import Truncation
from copris_lightning.engines.engine import Engine
from copris_lightning.errors import EngineError
from copris_lightning.rollout.scheduler import Event

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers' boot

Connected = tuple[VLLMServerEngine, Callable[..., Any]]


@pytest.mark.usefixtures("connected")  # a server's first request takes long
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
        for _ in range(9):  # the loop may be so late that all had been made already
            responses = call(hang_in_the_middle())
            if engine.servers[0].lost is not None:
                break
            servers[0].signal(signal.SIGCONT)
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
    module = small_module(
        checkpoint, lr=0.5, corrections=[Truncation(apply=False)]
    )  # asks for log-probs
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
