"""Groups of equal rewards are dropped and replaced, boundedly."""

from __future__ import annotations

import math

import pytest
from trajectories import trajectory

from copris_lightning.core.buffer import Status
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.errors import RolloutError
from copris_lightning.rollout.filters import ZeroVarianceFilter


def group(*rewards):
    rows = [trajectory(group=7, sample=i, reward=r) for i, r in enumerate(rewards)]
    return PromptGroup(0, 7, rows)


def test_groups_of_equal_rewards_are_refused_and_those_to_be_quarantined_are_not():
    accept = ZeroVarianceFilter(99, "Reward")
    assert accept(group(0.0, 1.0))
    assert accept(group(0.1, 0.1 + 1e-12))
    assert accept(group(math.nan, 0.0, 1.0))
    # The standard deviation of these rounds to something above zero.
    assert not accept(group(0.1, 0.1, 0.1))
    assert accept(group(math.nan, 1.0, math.inf))
    assert accept(group(math.nan, math.nan))
    assert accept(group(math.inf, math.inf))


def test_too_many_in_a_row_are_an_error_that_names_the_reward():
    accept = ZeroVarianceFilter(3, "ExactMatch")
    for _ in range(2):
        for _ in range(3):
            assert not accept(group(0.0, 0.0))
        assert accept(group(0.0, 1.0))  # and the count begins anew
    for _ in range(3):
        assert not accept(group(0.0, 0.0))
    with pytest.raises(RolloutError) as caught:
        accept(group(0.5, 0.5))
    for part in ("4 groups in a row", "ExactMatch", "0.5", "'p7'", "max_dropped_groups=3"):
        assert part in str(caught.value)


def by_prompt(response, prompt):
    """Every third prompt tells its responses apart."""
    index = int(prompt.id[1:])
    return float(len(response) % 2 if index % 3 == 0 else index % 2)


async def reward(response, prompt):
    return by_prompt(response, prompt)


@pytest.mark.parametrize("max_staleness", [None, 0, 2])
@pytest.mark.parametrize("cap", [3, 12, 40])
def test_dropped_groups_are_replaced_within_the_stage(rollout, cap, max_staleness):
    one = rollout(
        cap=cap,
        scorer=reward,
        max_staleness=max_staleness,
        accept=ZeroVarianceFilter(1000, "reward"),
    )
    dropped = 0
    for _ in range(30):
        groups, stats = one.collect()
        dropped += stats.dropped_groups
        for delivered in groups:
            assert len({t.reward for t in delivered.trajectories}) > 1
        in_flight = [e.in_flight for e in one.events]
        assert max(in_flight) <= cap
        one.sync()
    assert dropped > 30
    buffer = one.buffer
    assert buffer.count(Status.EVICTED) >= dropped * 3
    assert sum(buffer.count(status) for status in Status) == buffer.admitted
    drops = sum(e.kind == "drop" for e in one.events)
    assert drops * 3 == buffer.count(Status.EVICTED)


def test_the_cap_stays_full_when_groups_are_dropped(rollout):
    one = rollout(cap=12, scorer=reward, accept=ZeroVarianceFilter(1000, "reward"))
    for _ in range(10):
        start = len(one.events)
        one.collect()
        stage = one.events[start:]
        ends = [i for i, e in enumerate(stage) if e.kind == "carry_over"]
        steady = [e for e in stage[: ends[0]] if e.kind == "chunk"]
        assert {e.in_flight for e in steady} == {12}
        one.sync()


def test_a_reward_that_never_varies_ends_the_stage_with_an_error(rollout):
    one = rollout(
        cap=12, accept=ZeroVarianceFilter(20, "constant_reward")
    )  # its reward is constant
    with pytest.raises(RolloutError, match="21 groups in a row got equal rewards from constant_r"):
        one.collect()
    assert one.buffer.in_flight == 0
    assert one.buffer.ready_groups == 0


def test_the_group_that_is_one_too_many_is_not_delivered(rollout):
    """Not even where it completes the batch."""
    one = rollout(cap=12, batch_groups=1, accept=ZeroVarianceFilter(5, "constant_reward"))
    with pytest.raises(RolloutError, match="6 groups in a row"):
        one.collect()
    assert one.buffer.ready_groups == one.buffer.count(Status.TAKEN) == 0
