"""Where the time of a run goes: whatever takes long is booked to what it is, and the summary says
so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from builders import small_module
from copris_testing import SomePrompts
from simulated_fits import LoggingEngine, LoggingModule, Noting, build
from some_rewards import SlowFirst
from torch import Tensor

from copris_lightning import Evaluation, RunSummary
from copris_lightning.callbacks.time_shares import TimeShares, time_figures, utilization
from copris_lightning.callbacks.whole_run import time_lines, trained_tokens_per_s, what_binds
from copris_lightning.datamodules.cycle import ACTIVITIES, Lap
from copris_lightning.policy.flops import ModelCost, Work

PAUSE_S = 1.0


def seconds(figures: dict[str, float], suffix: str = "") -> dict[str, float]:
    """Of a cycle, by activity."""
    cycle = figures["time/cycle_s"]
    return {a: figures[f"time/{a}_fraction{suffix}"] * cycle for a in ACTIVITIES}


class Figures(L.Callback):
    """Keeps those of each batch; with the time, sleeps after the first."""

    def __init__(self, sleep_s: float = 0.0) -> None:
        self.sleep_s = sleep_s
        self.of_batches: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.of_batches.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        if len(self.of_batches) == 1:
            time.sleep(self.sleep_s)


class SlowSend(Noting):
    def send(self, weights: Any) -> None:
        if self.engine.log:  # not the first one, before any training
            time.sleep(PAUSE_S)
        super().send(weights)


class SlowSync(LoggingEngine):
    def transport(self, rank: int, run: Any) -> Any:
        return SlowSend(super().transport(rank, run), self)


class SlowStep(LoggingModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(PAUSE_S)
        return super().training_step(batch, batch_idx)


class SlowScore(LoggingModule):
    def forward(self, batch: Any) -> Tensor:
        if not self.log_ or self.log_[-1] == "collect":
            time.sleep(PAUSE_S)
        return super().forward(batch)


def fit(checkpoint: Path, directory: Path, slow: str) -> list[dict[str, float]]:
    """Two batches that are slow in one part, the first at least."""
    data: dict[str, Any] = {}
    if slow == "rollout":
        data["reward"] = SlowFirst(PAUSE_S)
    if slow == "validation":
        data["evaluations"] = {"a": Evaluation(SomePrompts(4))}
    options = {"check_val_every_n_epoch": None, "val_check_interval": 1, "num_sanity_val_steps": 0}
    found = Figures(PAUSE_S if slow == "idle" else 0.0)
    trainer, module, datamodule, log = build(
        checkpoint, directory, callbacks=[found], data=data, max_steps=2, **options
    )
    if slow == "sync":
        datamodule.engine = SlowSync(log)
    if slow == "train":
        module.__class__ = SlowStep
    if slow == "score":
        module.__class__ = SlowScore
    if slow == "validation":
        module.validation_step = lambda *args: time.sleep(3 * PAUSE_S)  # type: ignore[method-assign]
    trainer.fit(module, datamodule=datamodule)
    return found.of_batches


@pytest.mark.parametrize("slow", [*ACTIVITIES, "validation"])
def test_what_takes_long_is_booked_to_what_it_is(
    slow: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    batches = fit(tiny_checkpoint, tmp_path, slow)
    for figures in batches:
        assert sum(figures[f"time/{a}_fraction"] for a in ACTIVITIES) == pytest.approx(1.0)
        assert "train/mfu" not in figures  # a CPU's peak is not known
        assert 0 < figures["rollout/occupancy"] <= 1
    spent = seconds(batches[1 if slow in ("idle", "validation") else 0])
    if slow == "validation":
        assert sum(spent.values()) < 3 * PAUSE_S
    else:
        assert max(spent, key=spent.__getitem__) == slow
        assert spent[slow] > 0.99 * PAUSE_S  # clocks and floats differ a little
    synced = batches[0]["sync/seconds"]
    assert synced == pytest.approx(seconds(batches[0])["sync"], rel=1e-3)


def lap(**changes: float) -> Lap:
    parts = {"rollout": 6.0, "score": 0.5, "train": 2.5, "sync": 0.4, "idle": 0.6, **changes}
    return Lap({a: parts[a] for a in ACTIVITIES}, Work(100, 60, 900), Work(200, 120, 1800))


def test_utilization_is_of_the_time_in_which_the_trainer_computes(tiny_checkpoint: Path) -> None:
    module = small_module(tiny_checkpoint)
    cost = ModelCost.of(module)
    assert cost is not None
    found = TimeShares(peak=lambda device: 1e9).figures(lap(), module)
    needed = cost.forward(lap().scored) + cost.training(lap().trained)
    assert found["train/mfu"] == pytest.approx(needed / (3.0 * 1e9))
    assert found["train/tokens_per_s"] == pytest.approx(12.0)
    ranks = [dict(lap().seconds), dict(lap(train=0.5, idle=2.6).seconds)]
    assert utilization(needed, ranks, 1e9) == pytest.approx(needed / (4.0 * 1e9))


def test_shares_are_over_all_ranks_and_of_each() -> None:
    figures = time_figures([dict(lap().seconds), dict(lap(train=0.5, idle=2.6).seconds)], 120)
    assert figures["time/cycle_s"] == pytest.approx(10.0)
    assert figures["time/train_fraction"] == pytest.approx(0.15)
    assert figures["time/idle_fraction"] == pytest.approx(0.16)
    for rank, idle in enumerate([0.06, 0.26]):
        assert figures[f"time/idle_fraction/rank_{rank}"] == pytest.approx(idle)
        own = [figures[f"time/{a}_fraction/rank_{rank}"] for a in ACTIVITIES]
        assert sum(own) == pytest.approx(1.0)


def history(*cycles: dict[str, float]) -> dict[str, list[float]]:
    return {name: [cycle[name] for cycle in cycles] for name in cycles[0]}


def test_figures_of_a_run_weigh_each_cycle_by_its_time() -> None:
    one = time_figures([dict(lap().seconds)], 120)
    ten = time_figures([{a: 10 * s for a, s in lap(rollout=1.0).seconds.items()}], 120)
    engine = {"rollout/occupancy": 1.0, "rollout/stage_s": 1.0}
    full, half = {**one, **engine, "train/mfu": 0.4}, {**ten, **engine, "train/mfu": 0.2}
    half["rollout/occupancy"], half["rollout/stage_s"] = 0.5, 3.0
    run = history(full, half)
    assert trained_tokens_per_s(run) == pytest.approx(240 / 60)
    lines = dict(time_lines(run))
    assert lines["time"].startswith("rollout 26.7%, score 9.2%, train 45.8%")
    assert lines["time"].endswith("of 60.0 s")
    assert lines["engine"].startswith("62.5% of the cap")
    assert lines["trainer"].startswith("21.8% of the bf16 peak")  # (3 x 0.4 + 30 x 0.2) / 33
    assert lines["what binds"] == "nothing alone: train 46%, rollout 27%"
    assert not time_lines({})


@pytest.mark.parametrize(
    ("largest", "occupancy", "key"),
    [
        ("rollout", 0.99, "flow.cap"),
        ("rollout", 0.6, "flow.max_staleness"),
        ("score", 1.0, "flow.behavior_logprobs"),
        ("train", 1.0, "trainer.devices"),
        ("sync", 1.0, "engine.transport"),
        ("idle", 1.0, "trainer.callbacks"),
    ],
)
def test_what_binds_names_a_setting(largest: Any, occupancy: float, key: str) -> None:
    shares = {**dict.fromkeys(ACTIVITIES, 0.1), largest: 0.6}
    line = what_binds(shares, occupancy)
    assert line.startswith(f"{largest}: ")
    assert "60%" in line
    assert key in line


def test_the_summary_says_where_the_time_went_and_what_binds(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"reward": SlowFirst(4.0)}
    trainer, module, datamodule, _ = build(
        tiny_checkpoint, tmp_path, callbacks=[RunSummary()], data=data, max_steps=2
    )
    trainer.fit(module, datamodule=datamodule)
    lines = {line[:17].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}
    rate = float(lines["trained tokens/s"].replace(",", ""))
    wall = float(lines["time"].split(" of ")[1].split()[0])
    trained = float(lines["tokens"].split(" = ")[1].split()[0].replace(",", ""))
    assert rate * wall == pytest.approx(trained, rel=0.02)
    assert lines["what binds"].startswith(" rollout: training waits for a batch")
    assert "% of the cap in flight" in lines["engine"]
