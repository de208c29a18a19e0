"""The callbacks' own figures and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from copris_lightning.callbacks.ledger import _write
from copris_lightning.callbacks.staleness import LagStatistics
from copris_lightning.callbacks.weight_sync import WeightSync
from copris_lightning.errors import ConfigurationError


def test_lag_statistics_equal_a_count_by_hand() -> None:
    lags = torch.tensor([[0, 0, 1], [2, 2, 0], [3, 1, 1]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    ratio = torch.tensor([[1.0, 2.0, 0.5], [1.0, 1.0, 9.0], [4.0, 1.0, 1.0]])
    clipped = torch.tensor([[False, True, False], [False, False, True], [True, False, False]])
    statistics = LagStatistics(max_lag=2)
    statistics.update(lags, mask, ratio, clipped)
    figures = statistics.compute()
    weights = [1.0, 2.0, 0.5, 1.0, 1.0, 4.0, 1.0, 1.0]
    assert figures["staleness/lag_mean"] == pytest.approx((0 + 0 + 1 + 2 + 2 + 3 + 1 + 1) / 8)
    assert figures["staleness/lag_max"] == 3
    assert figures["staleness/mixed_fraction"] == pytest.approx(2 / 3)
    assert figures["is/ratio_mean"] == pytest.approx(sum(weights) / 8)
    assert figures["is/clip_fraction"] == pytest.approx(2 / 8)
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
    whole.update(lags, mask, ratio, clipped)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        split.update(lags[rows], mask[rows], ratio[rows], clipped[rows])
    assert split.compute() == pytest.approx(whole.compute())


def test_padding_does_not_make_a_trajectory_mixed() -> None:
    statistics = LagStatistics()
    lags = torch.tensor([[2, 2, 0]])  # padding has lag 0
    mask = torch.tensor([[True, True, False]])
    statistics.update(lags, mask, torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.bool))
    assert statistics.compute()["staleness/mixed_fraction"] == 0.0


def test_a_ledger_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger" / "batch_000000.jsonl"

    def records() -> object:
        yield {"a": 1}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        _write(path, records())  # type: ignore[arg-type]
    assert not path.exists()
    _write(path, [{"a": 1}, {"a": "ü"}])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()][1] == {"a": "ü"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"parity_tolerance": 0.0}, {"parity_sequences": 0}])
def test_weight_sync_refuses_numbers_that_switch_the_probe_off_by_accident(
    change: dict[str, float],
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        WeightSync(**change)  # type: ignore[arg-type]
