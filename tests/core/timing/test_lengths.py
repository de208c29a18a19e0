"""Lengths: drawn once, cut by the limit that is asked for, siblings together."""

from __future__ import annotations

from random import Random
from statistics import median

import pytest

from copris_lightning.core.timing.lengths import Draws, LogNormal, Recorded
from copris_lightning.errors import ConfigurationError


def test_the_same_responses_come_in_any_order_and_under_any_limit() -> None:
    one, other = (Draws(LogNormal(100.0, 1.0), 4, seed=3) for _ in range(2))
    forwards = [one.group(i, 10**6) for i in range(50)]
    backwards = [other.group(i, 10**6) for i in reversed(range(50))]
    assert forwards == backwards[::-1]
    assert [one.group(i, 150) for i in range(50)] == [[min(n, 150) for n in g] for g in forwards]
    assert forwards != [Draws(LogNormal(100.0, 1.0), 4, seed=4).group(i, 10**6) for i in range(50)]


def test_the_median_is_that_of_the_distribution_and_none_is_empty() -> None:
    draws = Draws(LogNormal(100.0, 1.5), 8)
    lengths = [n for i in range(2000) for n in draws.group(i, 10**6)]
    assert median(lengths) == pytest.approx(100, rel=0.05)
    assert min(Draws(LogNormal(0.01, 0.0), 8).group(0, 5)) == 1


def test_siblings_stay_together_and_other_group_sizes_are_drawn_from_them() -> None:
    recorded = Recorded([(1, 2), (30, 40)])
    draws = Draws(recorded, 2)
    assert {tuple(draws.group(i, 99)) for i in range(20)} == {(1, 2), (30, 40)}
    drawn = [recorded.draw(Random(seed), 5) for seed in range(20)]
    assert {len(group) for group in drawn} == {5}
    assert all(set(group) <= {1, 2} or set(group) <= {30, 40} for group in drawn)


@pytest.mark.parametrize(
    ("median_", "sigma", "message"),
    [
        (0.0, 1.0, "median=0.0 must be above 0"),
        (float("nan"), 1.0, "median=nan must be"),
        (1.0, -0.5, "sigma=-0.5 must be from 0 to 10"),
    ],
)
def test_distributions_that_cannot_be_are_refused(
    median_: float, sigma: float, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LogNormal(median_, sigma)


@pytest.mark.parametrize("groups", [[], [[]]])
def test_recorded_lengths_must_be_some(groups: list[list[int]]) -> None:
    with pytest.raises(ConfigurationError, match="must hold lengths"):
        Recorded(groups)
