"""Flows and caps side by side, and costs from measured gains."""

from __future__ import annotations

import pytest

from copris_lightning.core.timing.calibration import Measured, calibrate
from copris_lightning.core.timing.comparison import Comparison, best, flows
from copris_lightning.core.timing.costs import Costs, Work
from copris_lightning.core.timing.cycles import Sizes
from copris_lightning.core.timing.lengths import LogNormal
from copris_lightning.errors import ConfigurationError

COSTS = Costs(step_s=0.01, slot_s=1e-5, kv_s=1e-8, prefix_s=2e-5, train_s=1e-4, sync_s=0.1)


def comparison(costs: Costs = COSTS) -> Comparison:
    return Comparison(LogNormal(300.0, 1.0), Sizes(8, 4, 4000, 50), costs, batches=12, warm_up=6)


def test_gains_are_over_the_fastest_sync_whatever_its_cap() -> None:
    rows = comparison().rows(4000, [8, 32, 64], 3)
    assert [(row.cap, row.flow) for row in rows] == [
        (cap, name) for cap in (8, 32, 64) for name in flows(3)
    ]
    synced = {row.cap: row for row in rows if row.flow == "sync"}
    assert synced[8].cycle.seconds > synced[32].cycle.seconds
    assert synced[32].cycle == synced[64].cycle  # a batch is 32
    for row in rows:
        assert row.gain == pytest.approx(synced[32].cycle.seconds / row.cycle.seconds)
    found = best(rows)
    assert found["sync"].cap == 32
    assert {name: row.gain for name, row in found.items()} == {
        name: max(row.gain for row in rows if row.flow == name) for name in flows(3)
    }


def test_a_longer_tail_gains_more() -> None:
    gains = [
        {row.flow: row.gain for row in comparison().rows(limit, [64], None)}
        for limit in (500, 1000, 2000, 4000)
    ]
    for name in ("staged fresh", "staged kept"):
        assert sorted(gain[name] for gain in gains) == [gain[name] for gain in gains]


def test_where_prefixes_are_dear_the_best_cap_is_smaller_with_them_than_without() -> None:
    rows = comparison(Costs(step_s=0.01, prefix_s=5e-4)).rows(4000, [32, 64, 256], None)
    found = best(rows)
    assert found["staged fresh"].cap < found["staged kept"].cap == 256


def test_all_but_sync_have_the_bound_and_none_streams_without() -> None:
    bounds = {name: flow.max_staleness for name, flow in flows(7).items()}
    assert bounds.pop("sync") == 0
    assert set(bounds.values()) == {7}
    assert [name for name in bounds if name not in flows(None)] == [
        "streaming fresh",
        "streaming kept",
    ]


def test_calibrating_finds_the_costs_that_the_gains_came_from() -> None:
    measured = {
        row.limit: row.gain
        for limit in (500, 4000)
        for row in comparison().rows(limit, [64], None)
        if row.flow == "staged fresh"
    }
    unknown = Costs(step_s=0.01, slot_s=1e-5, kv_s=1e-8, sync_s=0.1)
    found = comparison(unknown)
    found.calibrate(measured, 64, None)
    assert found.costs.train_s == pytest.approx(COSTS.train_s, rel=1e-6)
    assert found.costs.prefix_s == pytest.approx(COSTS.prefix_s, rel=1e-6)


def test_gains_that_no_costs_explain_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"gains of 1\.5 and 99 with these lengths"):
        comparison().calibrate({500: 1.5, 4000: 99.0}, 64, None)
    work = Work(steps=2, trained=1, prefix=1, batches=1)
    with pytest.raises(ConfigurationError, match="measured: 1 gains, and two costs"):
        calibrate([Measured(1.5, work, work)], COSTS)
    with pytest.raises(ConfigurationError, match="no train_s and prefix_s"):
        calibrate([Measured(1.5, work, work)] * 2, COSTS)
