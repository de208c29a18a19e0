"""Estimators in whole fits on the simulated engine: presets, filters, quarantine, proximal."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from simulated_fits import build, ledger
from some_rewards import constant, no_verdict, no_verdict_sometimes

from copris_lightning import DecoupledRatio, KLPenalty, LagRejection, Masking, Truncation
from copris_lightning.__main__ import main
from copris_lightning.core.estimator.estimator import Estimate
from copris_lightning.core.saved import SavedGroups
from copris_lightning.errors import ConfigurationError, QuarantineError, RolloutError

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))


def logged(directory: Path) -> list[dict[str, float]]:
    """Metrics of each batch, from the CSV log."""
    (file,) = directory.rglob("metrics.csv")
    with file.open() as lines:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return [row for row in rows if "train/reward" in row]


class Keep(L.Callback):
    """Keeps the estimates of every micro-batch."""

    def __init__(self) -> None:
        self.estimates: list[Estimate] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *rest: Any) -> None:
        self.estimates.append(outputs["estimate"])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_trains(
    preset: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"cap": 12, "batch_groups": 4, "group_size": 2, "max_new_tokens": 40}
    arguments = [f"--{name}={value}" for name, value in small.items()]
    status = main(
        [
            "fit",
            f"--config={ROOT / 'configs' / 'simulated.yaml'}",
            f"--config={preset}",
            f"--model={tiny_checkpoint}",
            "--reward=some_rewards.Parity",
            *arguments,
            "--trainer.max_steps=4",
            "--trainer.enable_progress_bar=false",
            "--trainer.callbacks=copris_lightning.WeightSync",
            "--trainer.callbacks+=copris_lightning.StalenessMonitor",
            "--trainer.callbacks+=copris_lightning.TrajectoryLedger",
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            "--trainer.logger.save_dir=logs",
        ]
    )
    assert status == 0
    rows = logged(tmp_path)
    assert rows
    for row in rows:
        assert all(map(math.isfinite, row.values()))
        for name in ("is/ratio_mean", "is/ess", "kl/behavior", "policy/entropy"):
            assert name in row
        assert ("kl/mismatch" in row) == (preset.stem == "tis")
        assert ("kl/reference" in row) == (preset.stem == "grpo")
        assert ("correction/truncation_token/ess" in row) == (preset.stem == "tis")
        assert ("correction/decoupled/ess" in row) == (preset.stem == "decoupled")
    if preset.stem == "dapo":
        files = sorted(tmp_path.rglob("batch_*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        groups: dict[Any, set[float]] = {}
        for record in map(json.loads, lines):
            key = (record["batch"], record["prompt_id"])
            groups.setdefault(key, set()).add(record["reward"])
        assert all(len(rewards) > 1 for rewards in groups.values())


def test_presets_are_data_and_complete() -> None:
    """Each sets the same keys, so that one leaves nothing of another behind."""
    common = yaml.safe_load((ROOT / "configs" / "presets" / "copris.yaml").read_text())
    assert len(PRESETS) == 8
    for preset in PRESETS:
        config = yaml.safe_load(preset.read_text())
        assert set(config) == {"model", "data"}
        assert set(config["model"]["init_args"]) == set(common["model"]["init_args"])
        assert set(config["data"]["init_args"]) == set(common["data"]["init_args"])


def test_trajectories_without_a_verdict_are_quarantined_and_training_goes_on(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, _ = build(
        tiny_checkpoint,
        tmp_path,
        data={"reward": no_verdict_sometimes, "max_quarantined": 1.0},
    )
    trainer.fit(module, datamodule=data)
    records = ledger(tmp_path)
    assert len(records) == 6 * 4 * 2
    broken = [r for r in records if r["reward"] is None]
    assert broken
    for record in records:
        if record["reward"] is None:
            assert record["excluded"] == "its reward is nan"
            assert record["advantage"] == 0.0
        else:
            assert "excluded" not in record
    rows = logged(tmp_path)
    assert sum(row["train/quarantined"] for row in rows) == len(broken)
    assert all(math.isfinite(p) for p in module.parameters() for p in p.detach().flatten())


def test_past_the_share_quarantine_ends_the_run_and_loses_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data={"reward": no_verdict})
    with pytest.raises(QuarantineError, match=r"8 of the batch's 8 .*max_quarantined=0.25"):
        trainer.fit(module, datamodule=data)
    assert "train" not in log
    assert data.state_dict()["undivided"]
    assert len(SavedGroups.from_state(data.state_dict()["delivered"]).groups()) == 4


def test_a_reward_that_never_varies_is_an_error_under_dapo(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = {"reward": constant, "drop_zero_variance": True, "max_dropped_groups": 9}
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data=settings)
    with pytest.raises(RolloutError, match=r"10 groups in a row .*constant"):
        trainer.fit(module, datamodule=data)
    assert "train" not in log


def test_truncated_responses_are_named_and_not_trained_on(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    keep = Keep()
    settings = {"truncated": "mask", "max_new_tokens": 16}
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, callbacks=[keep], data=settings)
    trainer.fit(module, datamodule=data)
    records = ledger(tmp_path)
    masked = [r for r in records if r.get("excluded")]
    assert masked
    assert {r["excluded"] for r in masked} == {"truncated"}
    assert all((r["finish_reason"] == "length") == ("excluded" in r) for r in records)
    trained = sum(int(e.mask.sum()) for e in keep.estimates)
    assert trained == sum(r["response_tokens"] for r in records if "excluded" not in r)


@pytest.mark.parametrize("source", ["trainer", "engine"])
def test_a_recomputed_proximal_policy_is_where_the_batchs_training_starts(
    tiny_checkpoint: Path, tmp_path: Path, source: str
) -> None:
    keep = Keep()
    trainer, module, data, _ = build(
        tiny_checkpoint,
        tmp_path,
        callbacks=[keep],
        data={"updates": 2, "behavior_logprobs": source},
        model={"ratio": DecoupledRatio("recompute", None)},
        max_steps=8,
    )
    trainer.fit(module, datamodule=data)
    first, second = keep.estimates[::2], keep.estimates[1::2]
    for estimate in first:
        assert (estimate.ratio[estimate.mask] - 1).abs().max() < 1e-5
    assert max(float((e.ratio[e.mask] - 1).abs().max()) for e in second) > 1e-3
    if source == "trainer":  # carried over tokens have a behaviour that is not the proximal one
        assert max(float(e.behavior_kl[e.mask].max()) for e in first) > 1e-7


def test_corrections_are_measured_and_applied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The simulated engine's log-probs are not the model's: there is a mismatch to see."""
    corrections = [
        Truncation(max_weight=1.5),
        Masking(low=0.5, high=2.0, apply=False),
        LagRejection(max_lag=0),
    ]
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, model={"corrections": corrections})
    trainer.fit(module, datamodule=data)
    rows = logged(tmp_path)
    assert all(row["kl/mismatch"] > 0 for row in rows)
    for name in ("truncation_token", "masking_mismatch_token", "lag_rejection_token"):
        assert all(0 <= row[f"correction/{name}/ess"] <= 1 for row in rows)
    for row in rows:
        stale = 1 - row["staleness/token_fraction/lag_0"]
        assert row["correction/lag_rejection_token/rejected_fraction"] == pytest.approx(stale)
        assert row["correction/truncation_token/weight_mean"] <= 1.5


def test_a_mismatch_that_will_not_be_known_is_refused_before_the_engine_boots(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, log = build(
        tiny_checkpoint,
        tmp_path,
        data={"behavior_logprobs": "engine"},
        model={"corrections": [Truncation()]},
    )
    with pytest.raises(ConfigurationError, match=r"behavior_logprobs=engine.*set it to trainer"):
        trainer.fit(module, datamodule=data)
    assert log == []
    assert data.engine.closed == 0


def test_a_precision_that_would_round_logprobs_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, precision="bf16-true")
    with pytest.raises(ConfigurationError, match=r"trainer.precision=bf16-true .*bf16-mixed"):
        trainer.fit(module, datamodule=data)
    assert log == []


def test_the_reference_is_the_start_and_stays_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    keep = Keep()
    trainer, module, data, _ = build(
        tiny_checkpoint, tmp_path, callbacks=[keep], model={"kl": KLPenalty(0.01, "k3")}
    )
    trainer.fit(module, datamodule=data)
    first, last = keep.estimates[0], keep.estimates[-1]
    assert first.reference_kl is not None
    assert last.reference_kl is not None
    assert float(first.reference_kl[first.mask].max()) < 1e-6
    assert float(last.reference_kl[last.mask].mean()) > 1e-6
    assert not any("reference" in name for name in module.state_dict())


def test_normalizations_differ_only_in_the_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    losses = {}
    for name in ("token_mean", "constant"):
        trainer, module, data, _ = build(
            tiny_checkpoint, tmp_path / name, model={"normalization": name}, lr=0.0, max_steps=1
        )
        torch.manual_seed(0)
        trainer.fit(module, datamodule=data)
        losses[name] = (logged(tmp_path / name)[0]["train/loss"], ledger(tmp_path / name))
    (token, records), (constant, same) = losses["token_mean"], losses["constant"]
    assert [r["response"] for r in records] == [r["response"] for r in same]
    tokens = sum(r["response_tokens"] for r in records)
    assert constant * 8 * 48 == pytest.approx(token * tokens, rel=1e-4)
