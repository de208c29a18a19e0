"""An engine's time is that of its steps, one by one, though they are never gone through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copris_lightning.core.timing.costs import Costs
from copris_lightning.core.timing.decoding import Decoding
from copris_lightning.errors import ConfigurationError

COSTS = Costs(step_s=1.0, slot_s=0.25, kv_s=0.125, prefix_s=0.5)
"""Sums of these are exact."""

PROMPT = 3

lengths = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def step_by_step(given_lengths: list[int], until: float) -> tuple[list[tuple[int, float]], float]:
    """By the definition: which ended when, and the time at which no other step fits."""
    now = PROMPT * len(given_lengths) * COSTS.prefix_s
    made, ends = 0, []
    while alive := [length for length in given_lengths if length > made]:
        seconds = COSTS.step(len(alive)) + COSTS.kv_s * len(alive) * (PROMPT + made)
        if now + seconds > until:
            return ends, max(now, until)
        now, made = now + seconds, made + 1
        ends += [(key, now) for key, length in enumerate(given_lengths) if length == made]
    return ends, now


@given(lengths, st.integers(0, 200))
def test_it_is_where_single_steps_would_be(given_lengths: list[int], until: int) -> None:
    decoding = Decoding(COSTS)
    for key, length in enumerate(given_lengths):
        decoding.start((key, 0), PROMPT, 0, length)
    found = []
    while decoding.in_flight:
        ended = decoding.run(until)
        if not ended:
            break
        for key, _ in ended:
            assert decoding.leave((key, 0), PROMPT) == given_lengths[key]
            found.append((key, decoding.now))
    assert (found, decoding.now) == step_by_step(given_lengths, until)


def test_what_is_interrupted_goes_on_where_it_was() -> None:
    decoding = Decoding(COSTS)
    decoding.start((0, 0), PROMPT, 0, 10)
    decoding.run(decoding.now + 4 * 2.0)
    made = decoding.end_streams()
    assert 0 < made[0, 0] < 10
    assert decoding.in_flight == 0
    before = decoding.work
    decoding.start((0, 0), PROMPT, made[0, 0], 10)
    assert decoding.work.prefix - before.prefix == PROMPT + made[0, 0]
    assert decoding.run() == [(0, 0)]
    assert decoding.work.steps == 10


def test_measured_steps_are_interpolated_and_go_on_as_they_did() -> None:
    costs = Costs(steps=[(8, 2.0), (16, 3.0), (32, 7.0)])
    assert [costs.step(n) for n in (1, 8, 12, 16, 24, 32, 40)] == [2, 2, 2.5, 3, 5, 7, 9]
    assert Costs(steps=[(8, 2.0)]).step(99) == 2.0
    with pytest.raises(ValueError, match="linearly"):
        Decoding(costs).work.seconds(costs)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"kv_s": -1.0}, "kv_s=-1.0 must be at least 0"),
        ({"train_s": float("nan")}, "train_s=nan must be"),
        ({"step_s": float("inf")}, "step_s=inf must be"),
        ({"steps": [(8, 1.0), (4, 1.0)]}, r"steps=\[\(8, 1.0\), \(4, 1.0\)\] must be of rising"),
        ({"steps": [(0, 1.0)]}, "from 1 on"),
        ({"steps": [(1, -1.0)]}, "at least 0 seconds"),
    ],
)
def test_costs_that_cannot_be_are_refused(costs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Costs(**costs)
