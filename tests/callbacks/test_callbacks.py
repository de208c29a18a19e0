"""The callbacks' own figures and files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from copris_lightning.callbacks.ledger import _write
from copris_lightning.callbacks.staleness import CorrectionStatistics, LagStatistics
from copris_lightning.callbacks.weight_sync import WeightSync
from copris_lightning.core.estimator.estimator import Estimate
from copris_lightning.errors import ConfigurationError


def estimate(
    lags: Tensor, mask: Tensor, ratio: Tensor, low: Tensor, high: Tensor, **others: Tensor
) -> Estimate:
    kl = torch.full_like(ratio, 0.25)
    return Estimate(ratio, mask, lags, ratio, low & mask, high & mask, kl, **others)


def test_lag_statistics_equal_a_count_by_hand() -> None:
    lags = torch.tensor([[0, 0, 1], [2, 2, 0], [3, 1, 1]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    ratio = torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 9.0], [4.0, 1.0, 1.0]])
    low = torch.tensor([[False, False, False], [False, False, True], [True, False, False]])
    high = torch.tensor([[False, True, False], [False, False, True], [False, False, False]])
    statistics = LagStatistics(max_lag=2)
    entropy = torch.arange(9.0).reshape(3, 3)
    statistics.update(estimate(lags, mask, ratio, low, high, entropy=entropy))
    figures = statistics.compute()
    weights = [1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0, 1.0]
    assert figures["staleness/lag_mean"] == pytest.approx((0 + 0 + 1 + 2 + 2 + 3 + 1 + 1) / 8)
    assert figures["staleness/lag_max"] == 3
    assert figures["staleness/mixed_fraction"] == pytest.approx(2 / 3)
    assert figures["is/ratio_mean"] == pytest.approx(sum(weights) / 8)
    assert figures["is/ratio_min"] == 0.5
    assert figures["is/ratio_max"] == 4.0  # 9 stands at padding
    assert figures["is/clip_fraction"] == pytest.approx(2 / 8)
    assert figures["is/clip_fraction_low"] == figures["is/clip_fraction_high"] == 1 / 8
    assert figures["policy/entropy"] == pytest.approx((0 + 1 + 2 + 3 + 4 + 6 + 7 + 8) / 8)
    assert figures["policy/entropy/lag_0"] == pytest.approx((0 + 1) / 2)
    assert figures["kl/behavior"] == pytest.approx(0.25)
    assert figures["is/ess/lag_0"] == pytest.approx((1 + 2) ** 2 / (2 * (1 + 4)))
    assert (figures["is/ratio_min/lag_1"], figures["is/ratio_max/lag_1"]) == (0.5, 1.0)
    assert not [name for name in figures if "mismatch" in name or "reference" in name]
    squares = sum(w * w for w in weights)
    assert figures["is/ess"] == pytest.approx(sum(weights) ** 2 / (8 * squares))
    assert figures["is/ratio_mean/lag_1"] == pytest.approx((0.5 + 1 + 1) / 3)
    # Lag 3 lies beyond the last bin, which takes it.
    assert figures["is/ratio_mean/lag_2"] == pytest.approx((1 + 1 + 4) / 3)
    assert figures["is/clip_fraction/lag_2"] == pytest.approx(1 / 3)
    fractions = [figures[f"staleness/token_fraction/lag_{lag}"] for lag in range(3)]
    assert fractions == pytest.approx([2 / 8, 3 / 8, 3 / 8])


def test_lag_statistics_add_up_over_micro_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    lags = torch.randint(0, 6, (8, 5), generator=generator)
    mask = torch.rand(8, 5, generator=generator) < 0.8
    mask[:, 0] = True
    ratio = torch.rand(8, 5, generator=generator)
    clipped = ratio > 0.7
    whole, split = LagStatistics(8), LagStatistics(8)
    none = torch.zeros_like(clipped)
    whole.update(estimate(lags, mask, ratio, clipped, none, entropy=ratio))
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        parts = (v[rows] for v in (lags, mask, ratio, clipped, none))
        split.update(estimate(*parts, entropy=ratio[rows]))
    assert split.compute() == pytest.approx(whole.compute())


def test_padding_does_not_make_a_trajectory_mixed() -> None:
    statistics = LagStatistics()
    lags = torch.tensor([[2, 2, 0]])  # padding has lag 0
    mask = torch.tensor([[True, True, False]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    statistics.update(estimate(lags, mask, torch.ones(1, 3), none, none))
    assert statistics.compute()["staleness/mixed_fraction"] == 0.0


def test_a_micro_batch_without_trained_tokens_changes_nothing() -> None:
    statistics = LagStatistics()
    assert statistics.compute() == {}
    none = torch.zeros(2, 3, dtype=torch.bool)
    nothing = estimate(torch.full((2, 3), 5), none, torch.full((2, 3), 7.0), none, none)
    statistics.update(nothing)
    assert statistics.compute() == {}
    some = torch.ones(1, 2, dtype=torch.bool)
    one = estimate(torch.ones(1, 2).long(), some, torch.ones(1, 2), ~some, ~some)
    statistics.update(one)
    before = statistics.compute()
    statistics.update(nothing)
    assert statistics.compute() == before


def test_the_mismatch_ratio_is_measured_where_it_is_known() -> None:
    statistics = LagStatistics()
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio, log_mismatch = torch.ones(1, 2), torch.tensor([[0.0, -0.5]])
    statistics.update(estimate(mask.long(), mask, ratio, ~mask, ~mask, mismatch=log_mismatch))
    figures, low = statistics.compute(), math.exp(-0.5)
    assert figures["mismatch/ratio_mean"] == pytest.approx((1 + low) / 2)
    assert figures["mismatch/ratio_min"] == pytest.approx(low)
    assert figures["mismatch/ratio_max"] == 1.0
    assert figures["mismatch/ess"] == pytest.approx((1 + low) ** 2 / (2 * (1 + low**2)))


def test_correction_statistics_equal_a_count_by_hand() -> None:
    statistics = CorrectionStatistics()
    assert statistics.compute() == {}
    mask = torch.tensor([[True, True, True], [True, False, False]])
    statistics.update(torch.tensor([[2.0, 1.0, 0.0], [1.0, 50.0, 0.0]]), mask)
    figures = statistics.compute()
    assert figures["weight_mean"] == 1.0
    assert figures["rejected_fraction"] == 1 / 4
    assert figures["ess"] == pytest.approx(4**2 / (4 * 6))


def test_a_ledger_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "batch_000000.jsonl"

    def records() -> object:
        yield {"a": 1}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        _write(path, records())
    assert not path.exists()
    _write(path, [{"a": 1}, {"a": "ü"}])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()][1] == {"a": "ü"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change", [{"parity_tolerance": 0.0}, {"parity_tolerance": math.nan}, {"parity_sequences": 0}]
)
def test_weight_sync_refuses_numbers_that_switch_the_probe_off_by_accident(
    change: dict[str, float],
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        WeightSync(**change)
