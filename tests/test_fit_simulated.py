"""`fit` through Lightning on the simulated engine: order, checkpoints, flags and failures."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from copris_testing import SomePrompts
from lightning.pytorch.callbacks import ModelCheckpoint
from simulated_fits import LoggingEngine, build, ledger
from some_rewards import FailingReward, slow
from torch import Tensor

from copris_lightning import (
    Evaluation,
    RolloutDataModule,
    RolloutProgressBar,
    WeightSync,
)
from copris_lightning.engines.simulated import Faults
from copris_lightning.errors import ConfigurationError, EngineError, ParityError, RewardError


@pytest.fixture(autouse=True)
def no_rollout_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # the suite's shared engine has one too
    yield
    started = set(threading.enumerate()) - before
    assert not [t for t in started if t.name == "copris-rollout"]


def assert_closed(datamodule: RolloutDataModule) -> None:
    assert datamodule.session is None
    assert datamodule.engine.closed == 1


@pytest.mark.parametrize(("updates", "accumulate"), [(1, 1), (1, 3), (2, 2)])
def test_the_order_is_collect_train_sync(
    tiny_checkpoint: Path, tmp_path: Path, updates: int, accumulate: int
) -> None:
    trainer, module, data, log = build(
        tiny_checkpoint,
        tmp_path,
        data={"updates": updates},
        accumulate_grad_batches=accumulate,
        max_steps=3 * updates,
    )
    trainer.fit(module, datamodule=data)
    expected = ["sync 0"]
    for version in (1, 2, 3):
        expected += ["collect", *["train"] * (updates * accumulate), f"sync {version}"]
    assert log == expected
    assert_closed(data)


def test_nothing_is_lost_or_doubled_over_two_epochs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=12)
    trainer.fit(module, datamodule=data)
    records = ledger(tmp_path)
    assert len(records) == 12 * 4 * 2
    # 12 batches of 4 groups are two epochs of 24 prompts, less what is still carried over; a
    # prompt of the third epoch may overtake those.
    assert max(Counter((r["prompt_id"], r["sample"]) for r in records).values()) <= 3
    assert [r["batch"] for r in records] == sorted(r["batch"] for r in records)
    for record in records:
        versions = [segment["version"] for segment in record["segments"]]
        assert versions == sorted(set(versions))
        assert sum(s["tokens"] for s in record["segments"]) == record["response_tokens"]
        assert versions[-1] <= record["batch"]
    assert any(len(r["segments"]) > 1 for r in records)


@pytest.mark.parametrize("when", ["at a sync", "within a batch"])
def test_a_run_resumed_from_a_checkpoint_trains_on_exactly_what_the_uncut_run_would(
    tiny_checkpoint: Path, tmp_path: Path, when: str
) -> None:
    updates = 2 if when == "within a batch" else 1
    settings = {"updates": updates}
    total, cut = (8, 3) if updates == 2 else (6, 3)
    uncut, module, data, _ = build(
        tiny_checkpoint, tmp_path / "uncut", data=settings, max_steps=total
    )
    uncut.fit(module, datamodule=data)

    checkpoint = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=cut, save_top_k=-1)
    first, module, data, _ = build(
        tiny_checkpoint,
        tmp_path / "cut",
        data=settings,
        max_steps=cut,
        enable_checkpointing=True,
        callbacks=[checkpoint],
    )
    first.fit(module, datamodule=data)
    second, module, data, log = build(
        tiny_checkpoint, tmp_path / "cut", data=settings, max_steps=total
    )
    # The safe loader: the rollout's state is plain values.
    second.fit(module, datamodule=data, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)

    # The engine gets the restored weights before anything is generated or trained.
    assert log[0] == ("sync 3" if updates == 1 else "sync 1")
    assert log[1] == ("collect" if updates == 1 else "train")
    ours, theirs = ledger(tmp_path / "cut"), ledger(tmp_path / "uncut")
    same = ("batch", "prompt_id", "sample", "segments", "response", "reward", "advantage")
    assert [{k: r[k] for k in same} for r in ours] == [{k: r[k] for k in same} for r in theirs]


def test_with_learning_rate_zero_the_ratio_to_the_trainers_logprobs_is_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ratios: list[Tensor] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int):
            ratios.append(outputs["estimate"].ratio[outputs["estimate"].mask])

    trainer, module, data, _ = build(
        tiny_checkpoint, tmp_path, lr=0.0, callbacks=[Keep()], accumulate_grad_batches=2
    )
    trainer.fit(module, datamodule=data)
    assert any(len(r["segments"]) > 1 for r in ledger(tmp_path))
    assert (torch.cat(ratios) - 1).abs().max() < 1e-4


def test_metrics_have_the_names_of_the_design(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path)
    trainer.fit(module, datamodule=data)
    names = set(trainer.callback_metrics)
    assert names >= {
        "train/loss",
        "train/reward",
        "is/ratio_mean",
        "is/clip_fraction",
        "is/ess",
        "rollout/in_flight",
        "rollout/carried_over",
        "rollout/tokens_per_s",
        "rollout/stage_s",
        "staleness/lag_mean",
        "staleness/lag_max",
        "staleness/mixed_fraction",
        "sync/seconds",
        "rollout/occupancy",
        "train/tokens_per_s",
        *(f"time/{part}_fraction" for part in ("rollout", "score", "train", "sync", "idle")),
    }
    last = [r for r in ledger(tmp_path) if r["batch"] == 5]
    mixed = sum(len(r["segments"]) > 1 for r in last) / len(last)
    lags = [5 - s["version"] for r in last for s in r["segments"] for _ in range(s["tokens"])]
    assert trainer.callback_metrics["staleness/mixed_fraction"] == pytest.approx(mixed)
    assert trainer.callback_metrics["staleness/lag_mean"] == pytest.approx(sum(lags) / len(lags))
    assert trainer.callback_metrics["staleness/lag_max"] == max(lags)


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_staleness_bound_holds_for_every_trained_token(
    tiny_checkpoint: Path, tmp_path: Path, staleness: int
) -> None:
    trainer, module, data, _ = build(
        tiny_checkpoint, tmp_path, data={"max_staleness": staleness}, max_steps=10
    )
    trainer.fit(module, datamodule=data)
    lags = [r["batch"] - s["version"] for r in ledger(tmp_path) for s in r["segments"]]
    assert max(lags) == staleness


@pytest.mark.parametrize(
    "flags",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3, "accumulate_grad_batches": 2},
        {"logger": False},
        {"limit_val_batches": 0},
        {"limit_train_batches": 2, "max_epochs": 2, "max_steps": -1},
        {"max_time": "00:00:00:00"},
    ],
    ids=str,
)
def test_trainer_flags_end_cleanly(
    tiny_checkpoint: Path, tmp_path: Path, flags: dict[str, Any]
) -> None:
    trainer, module, data, log = build(
        tiny_checkpoint, tmp_path, data={"evaluations": {"a": Evaluation(SomePrompts(6))}}, **flags
    )
    trainer.fit(module, datamodule=data)
    assert log[0] == "sync 0"
    assert_closed(data)


def test_validation_during_fit_leaves_training_as_it_was(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name, options in (("with", {"val_check_interval": 2}), ("without", {})):
        several = {"a": Evaluation(SomePrompts(9), samples=3), "b": Evaluation(SomePrompts(2))}
        prompts = {"evaluations": several} if options else {}
        trainer, module, data, _ = build(
            tiny_checkpoint, tmp_path / name, data=prompts, check_val_every_n_epoch=1, **options
        )
        trainer.fit(module, datamodule=data)
        for metric in ("avg_at_k", "pass_at_k"):
            for evaluation in several:
                found = f"val/{evaluation}/{metric}" in trainer.callback_metrics
                assert found == bool(options)
    assert ledger(tmp_path / "with") == ledger(tmp_path / "without")


def test_an_exception_in_the_reward_surfaces_with_its_cause_and_the_prompt(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, _ = build(
        tiny_checkpoint, tmp_path, data={"reward": FailingReward(after=0)}
    )
    with pytest.raises(RewardError, match=r"reward of prompt 'p0\d\d' raised") as error:
        trainer.fit(module, datamodule=data)
    assert isinstance(error.value.__cause__, KeyError)
    assert_closed(data)


def test_an_engine_that_dies_ends_the_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, faults=Faults(die_after_tokens=500))
    with pytest.raises(EngineError, match="died"):
        trainer.fit(module, datamodule=data)
    assert_closed(data)


def test_an_interrupt_while_a_rollout_runs_ends_cleanly(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    class Interrupt(RolloutProgressBar):
        def on_rollout_progress(self, progress: Any) -> None:
            raise KeyboardInterrupt

    trainer, module, data, _ = build(
        tiny_checkpoint,
        tmp_path,
        data={"reward": slow},
        callbacks=[Interrupt()],
        enable_progress_bar=True,
        max_steps=1,
    )
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(module, datamodule=data)
    assert_closed(data)


def test_a_checkpoint_can_be_saved_after_fit_and_continued(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=3)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, max_steps=4)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "after.ckpt", weights_only=True)
    assert log == ["sync 3", "collect", "train", "sync 4"]
    assert sorted({r["batch"] for r in ledger(tmp_path)}) == [0, 1, 2, 3]


def test_the_same_objects_can_fit_validate_and_test(tiny_checkpoint: Path, tmp_path: Path) -> None:
    evaluations = {
        "a": Evaluation(SomePrompts(6)),
        "b": Evaluation(SomePrompts(5), on="test"),
        "c": Evaluation(SomePrompts(3), on="test"),
    }
    data = {"evaluations": evaluations}
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data=data, max_steps=2)
    trainer.fit(module, datamodule=data)
    log.clear()
    [found] = trainer.validate(module, datamodule=data, verbose=False)
    assert "val/a/avg_at_k" in found
    first, second = trainer.test(module, datamodule=data, verbose=False)
    assert "test/b/avg_at_k" in first
    assert "test/c/avg_at_k" in second
    # Each command boots an engine and gives it the trained weights.
    assert log == ["sync 2", "sync 2"]
    assert data.session is None


def test_a_batch_cut_by_a_checkpoint_is_not_divided_anew(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = {"updates": 2}
    save = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=1, save_top_k=-1)
    trainer, module, datamodule, _ = build(
        tiny_checkpoint,
        tmp_path / "a",
        data=data,
        max_steps=1,
        enable_checkpointing=True,
        callbacks=[save],
    )
    trainer.fit(module, datamodule=datamodule)
    trainer, module, datamodule, _ = build(
        tiny_checkpoint, tmp_path / "b", data=data, accumulate_grad_batches=2
    )
    with pytest.raises(ConfigurationError, match=r"within a batch of \[1, 2, 1\].*\[1, 2, 2\]"):
        trainer.fit(module, datamodule=datamodule, ckpt_path=tmp_path / "cut.ckpt")


class EverySecond(WeightSync):
    """Leaves out every second sync."""

    batches = 0

    def should_sync(self, trainer: Any, batch: Any) -> bool:
        self.batches += 1
        return self.batches % 2 == 0


@pytest.mark.parametrize("source", ["trainer", "engine"])
def test_trainer_logprobs_need_a_sync_after_every_batch(
    tiny_checkpoint: Path, tmp_path: Path, source: str
) -> None:
    trainer, module, data, log = build(
        tiny_checkpoint, tmp_path, data={"behavior_logprobs": source}, max_steps=4
    )
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, WeightSync)]
    trainer.callbacks.insert(0, EverySecond())
    if source == "engine":
        trainer.fit(module, datamodule=data)
        assert [entry for entry in log if "sync" in entry] == ["sync 0", "sync 1", "sync 2"]
    else:
        with pytest.raises(ConfigurationError, match="behavior_logprobs=trainer needs a weight"):
            trainer.fit(module, datamodule=data)
        assert log == ["sync 0", "collect", "train"]


@pytest.mark.parametrize(
    "limit",
    [
        {"limit_train_batches": 3},
        {"limit_train_batches": 3, "max_epochs": 1},
        {"limit_train_batches": 0.26},
        {"overfit_batches": 2},
    ],
    ids=str,
)
def test_an_epoch_that_ends_within_a_batch_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, limit: dict[str, Any]
) -> None:
    trainer, module, data, log = build(
        tiny_checkpoint, tmp_path, **limit, accumulate_grad_batches=2
    )
    (name, value), *_ = limit.items()
    with pytest.raises(ConfigurationError, match=rf"trainer\.{name}={value}"):
        trainer.fit(module, datamodule=data)
    assert log == []


def test_a_new_run_does_not_write_into_another_runs_ledger(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=1)
    trainer.fit(module, datamodule=data)
    before = ledger(tmp_path)
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=1)
    with pytest.raises(ConfigurationError, match="holds the ledger of another run"):
        trainer.fit(module, datamodule=data)
    assert ledger(tmp_path) == before
    assert data.engine.closed == 0  # it was never started


class WrongScores(LoggingEngine):
    """Pretends to have a model, whose log-probs are off by a hundredth."""

    dtype = "float32"

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        scores = []
        for tokens in sequences:
            with torch.no_grad():
                logits = self.module.policy.model(torch.tensor([tokens])).logits[0, :-1]
            targets = torch.tensor(tokens[1:])[:, None]
            values = logits.log_softmax(-1).gather(1, targets)[:, 0]
            scores.append([*values[:-1].tolist(), float(values[-1]) + self.off])
        return scores


@pytest.mark.parametrize("off", [0.0, 0.01, float("nan")])
def test_the_parity_probe_sees_a_difference_of_one_token(
    tiny_checkpoint: Path, tmp_path: Path, off: float
) -> None:
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, max_steps=2)
    data.engine = WrongScores(log)
    data.engine.module, data.engine.off = module, off
    if off == 0.0:
        trainer.fit(module, datamodule=data)
        assert trainer.callback_metrics["sync/parity_max_abs"] < 1e-5
    else:
        with pytest.raises(ParityError, match=r"version 0 .* WeightSync.parity_tolerance=auto"):
            trainer.fit(module, datamodule=data)
    assert_closed(data)
