"""Where the time of a run goes: whatever takes long is booked to what it is, and the summary says
so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from builders import small_module
from copris_testing import SomePrompts
from simulated_fits import LoggingModule, build
from torch import Tensor

from copris_lightning import Evaluation, RunSummary
from copris_lightning.callbacks.time_shares import TimeShares, time_figures, utilization
from copris_lightning.callbacks.whole_run import time_lines, trained_tokens_per_s, what_binds
from copris_lightning.datamodules.cycle import ACTIVITIES, Cycle, Lap
from copris_lightning.policy.flops import ModelCost, Work

PAUSE_S = 20.0
"""By a clock that is moved by hand."""


def seconds(figures: dict[str, float], suffix: str = "") -> dict[str, float]:
    """Of a cycle, by activity."""
    cycle = figures["time/cycle_s"]
    return {a: figures[f"time/{a}_fraction{suffix}"] * cycle for a in ACTIVITIES}


class Clock:
    """Moves only where a test says that something takes long."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self) -> None:
        self.now += PAUSE_S


class Figures(L.Callback):
    """Runs the feed by a clock, and keeps the figures of each batch."""

    def __init__(self, clock: Clock, *, is_slow: bool) -> None:
        self.clock, self.is_slow = clock, is_slow
        self.of_batches: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Any, *args: Any) -> None:
        trainer.datamodule.feed.cycle = Cycle(self.clock)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.of_batches.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        if self.is_slow:
            self.clock.pass_by()


class SlowModule(LoggingModule):
    """Takes long in one of its methods."""

    slow: tuple[str, Clock]

    def training_step(self, *args: Any) -> Any:
        self.pass_by("train")
        return super().training_step(*args)

    def validation_step(self, *args: Any) -> None:
        self.pass_by("validation")

    def forward(self, batch: Any) -> Tensor:
        self.pass_by("score")
        return super().forward(batch)

    def named_weights(self, root: Any = None) -> Any:
        self.pass_by("sync")
        return super().named_weights(root)

    def pass_by(self, method: str) -> None:
        if self.slow[0] == method:
            self.slow[1].pass_by()


def fit(checkpoint: Path, directory: Path, slow: str) -> list[dict[str, float]]:
    """The figures of two batches, each of which takes long in one part."""
    clock = Clock()
    figures = Figures(clock, is_slow=slow == "idle")
    options: dict[str, Any] = {"check_val_every_n_epoch": None, "val_check_interval": 1}
    trainer, module, datamodule, _ = build(
        checkpoint,
        directory,
        callbacks=[figures],
        data={"evaluations": {"a": Evaluation(SomePrompts(4))}},
        max_steps=2,
        **options,
    )
    if slow == "rollout":
        datamodule.observers.append(lambda e: clock.pass_by() if e.kind == "deliver" else None)
    module.__class__ = SlowModule
    module.slow = (slow, clock)
    trainer.fit(module, datamodule=datamodule)
    return figures.of_batches


@pytest.mark.parametrize("slow", [*ACTIVITIES, "validation"])
def test_what_takes_long_is_booked_to_what_it_is(
    slow: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    batches = fit(tiny_checkpoint, tmp_path, slow)
    for figures in batches:
        assert "train/mfu" not in figures  # a CPU's peak is not known
        assert 0 < figures["rollout/occupancy"] <= 1
    spent = seconds(batches[1])
    if slow == "validation":  # comes between the two
        assert spent == dict.fromkeys(ACTIVITIES, 0.0)
        return
    assert spent[slow] >= 0.99 * PAUSE_S  # what is lost was spent in reducing over one rank
    assert spent[slow] + spent["idle"] * (slow != "idle") == pytest.approx(
        figures["time/cycle_s"], rel=1e-5
    )
    assert batches[1]["sync/seconds"] == pytest.approx(spent["sync"])


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
    clock = Clock()
    callbacks = [RunSummary(), Figures(clock, is_slow=False)]
    trainer, module, datamodule, _ = build(
        tiny_checkpoint, tmp_path, callbacks=callbacks, max_steps=2
    )
    datamodule.observers.append(lambda e: clock.pass_by() if e.kind == "deliver" else None)
    trainer.fit(module, datamodule=datamodule)
    lines = {line[:17].strip(): line[17:] for line in capsys.readouterr().out.splitlines()}
    rate = float(lines["trained tokens/s"].replace(",", ""))
    wall = float(lines["time"].split(" of ")[1].split()[0].replace(",", ""))
    trained = float(lines["tokens"].split(" = ")[1].split()[0].replace(",", ""))
    assert wall == 2 * PAUSE_S
    assert rate == round(trained / wall)
    assert lines["time"].strip().startswith("rollout 100.0%, score 0.0%")
    assert lines["what binds"].strip().startswith("rollout: training waits for a batch 100%")
    assert "% of the cap in flight" in lines["engine"]
