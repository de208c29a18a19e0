"""Group-relative advantages and the overlong penalty against the formulas in plain floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.advantage import (
    STD_EPSILON,
    dr_grpo,
    grpo,
    rloo,
    soft_overlong_penalty,
)

VALUES = st.floats(-100, 100)


def mean(row):
    return math.fsum(row) / len(row)


def std(row):
    return math.sqrt(math.fsum((r - mean(row)) ** 2 for r in row) / (len(row) - 1))


def oracle_grpo(row):
    return [(r - mean(row)) / (std(row) + 1e-6) for r in row]


def oracle_dr_grpo(row):
    return [r - mean(row) for r in row]


def oracle_rloo(row):
    """Against the mean of the others, left out one by one."""
    return [r - mean(row[:j] + row[j + 1 :]) for j, r in enumerate(row)]


ORACLES = {grpo: oracle_grpo, dr_grpo: oracle_dr_grpo, rloo: oracle_rloo}
EVERY = pytest.mark.parametrize("estimator", ORACLES, ids=lambda f: f.__name__)


def oracle(estimator, rows):
    return [[0.0] * len(row) if min(row) == max(row) else ORACLES[estimator](row) for row in rows]


@st.composite
def reward_rows(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    row = st.lists(VALUES, min_size=size, max_size=size) | VALUES.map(lambda v: [v] * size)
    return draw(st.lists(row, min_size=groups, max_size=groups))


@EVERY
@settings(max_examples=50, deadline=None)
@given(rows=reward_rows())
def test_advantages_follow_the_formula(estimator, rows):
    actual = estimator(torch.tensor(rows, dtype=torch.float64))
    assert actual.dtype is torch.float32
    expected = torch.tensor(oracle(estimator, rows), dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)


def test_advantages_of_known_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.866025, -0.866025] * 2])
    torch.testing.assert_close(grpo(rewards), expected, rtol=1e-5, atol=0)
    centered = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, -0.5, 0.5, -0.5]])
    assert torch.equal(dr_grpo(rewards), centered)
    others = torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3], [2 / 3, -2 / 3, 2 / 3, -2 / 3]])
    torch.testing.assert_close(rloo(rewards), others)


@EVERY
@settings(max_examples=50, deadline=None)
@given(
    value=st.floats(-1e6, 1e6) | st.sampled_from([0.1, 0.7, 1 / 3]),
    size=st.integers(2, 33),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_rewards_get_exactly_zero(estimator, value, size, dtype):
    """Also where the mean rounds off the value, and beside a group of unequal rewards."""
    rewards = torch.tensor([[value] * size, [value] * (size - 1) + [value + 1.0]], dtype=dtype)
    advantages = estimator(rewards)
    assert torch.equal(advantages[0], torch.zeros(size))
    assert advantages[1, -1] > 0 > advantages[1, 0]


@pytest.mark.parametrize("gap", [1e-9, 1e-12, 1e-15])
def test_nearly_equal_rewards_get_small_advantages_rather_than_whole_deviations(gap):
    """The same gap divided by its own deviation would be an advantage of about one."""
    rewards = torch.tensor([[1.0, 1.0 + gap, 1.0, 1.0 - gap]], dtype=torch.float64)
    advantages = grpo(rewards).abs().max().item()
    assert 0 < advantages <= 1.2 * gap / STD_EPSILON
    for estimator in (dr_grpo, rloo):
        assert 0 < estimator(rewards).abs().max().item() <= 2 * gap


@settings(max_examples=60, deadline=None)
@given(reward_rows())
def test_grpo_never_exceeds_what_a_group_of_that_size_allows(rows):
    """One against the rest is the most unequal a group can be: (G - 1) / sqrt(G) deviations."""
    size = len(rows[0])
    advantages = grpo(torch.tensor(rows, dtype=torch.float64))
    assert advantages.abs().max() <= (size - 1) / math.sqrt(size) + 1e-5


@EVERY
@settings(max_examples=30, deadline=None)
@given(rows=reward_rows(), shift=VALUES)
def test_a_constant_added_to_a_group_changes_nothing(estimator, rows, shift):
    rewards = torch.tensor(rows, dtype=torch.float64).round(decimals=3)
    # Rewards that differ at all differ by 1e-3, so rounding stays small beside that.
    before, after = estimator(rewards), estimator(rewards + shift)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(reward_rows(), st.floats(1, 100))
def test_the_unit_of_reward_changes_nothing_with_grpo_and_scales_the_others(rows, scale):
    rewards = torch.tensor(rows, dtype=torch.float64).round(decimals=2)
    torch.testing.assert_close(grpo(rewards * scale), grpo(rewards), rtol=1e-3, atol=1e-4)
    for estimator in (dr_grpo, rloo):
        torch.testing.assert_close(
            estimator(rewards * scale), estimator(rewards) * scale, rtol=1e-5, atol=1e-5
        )


@EVERY
@settings(max_examples=30, deadline=None)
@given(rows=reward_rows())
def test_advantages_of_a_group_add_up_to_zero_and_ignore_other_groups(estimator, rows):
    rewards = torch.tensor(rows, dtype=torch.float64)
    together = estimator(rewards)
    torch.testing.assert_close(together.sum(1), torch.zeros(len(rows)), rtol=0, atol=1e-4)
    for i in range(len(rows)):
        assert torch.equal(estimator(rewards[i : i + 1])[0], together[i])


def test_small_differences_survive_since_the_mean_is_taken_in_double():
    rewards = torch.tensor([[1.0, 1.0 + 1e-9]], dtype=torch.float64)
    expected = torch.tensor([[-0.5e-9, 0.5e-9]])
    torch.testing.assert_close(dr_grpo(rewards), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(rloo(rewards), 2 * expected, rtol=1e-5, atol=0)


@EVERY
def test_integer_rewards_are_taken(estimator):
    assert torch.equal(estimator(torch.tensor([[0, 3]])), estimator(torch.tensor([[0.0, 3.0]])))
    assert estimator(torch.tensor([[0, 3]])).tolist()[0][1] > 0


@EVERY
@pytest.mark.parametrize("shape", [(4,), (3, 1), (1, 2, 2), (3, 0)])
def test_rewards_without_a_group_to_compare_with_are_refused(estimator, shape):
    with pytest.raises(ValueError, match="groups, G >= 2"):
        estimator(torch.zeros(shape))


@EVERY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(estimator, value):
    with pytest.raises(ValueError, match="finite"):
        estimator(torch.tensor([[0.0, 1.0], [0.0, value]]))


def oracle_overlong(n, limit, cushion):
    """Equation 13 of DAPO, case by case."""
    if n <= limit - cushion:
        return 0.0
    if n <= limit:
        return ((limit - cushion) - n) / cushion
    return -1.0


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_the_overlong_penalty_follows_its_three_cases(data):
    limit = data.draw(st.integers(1, 5000))
    cushion = data.draw(st.floats(0.5, limit) if limit > 1 else st.just(1))
    lengths = data.draw(st.lists(st.integers(0, 2 * limit), min_size=1, max_size=8))
    actual = soft_overlong_penalty(torch.tensor(lengths), limit, cushion)
    assert actual.dtype is torch.float64
    expected = [oracle_overlong(n, limit, cushion) for n in lengths]
    assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_overlong_penalty_of_known_lengths_keeps_their_shape():
    lengths = torch.tensor([[0, 80, 85], [90, 100, 140]])
    expected = [[0.0, 0.0, -0.25], [-0.5, -1.0, -1.0]]
    assert soft_overlong_penalty(lengths, 100, 20).tolist() == expected
    # Over the whole response: it grows from the first token on.
    assert soft_overlong_penalty(lengths, 100, 100)[0].tolist() == [0.0, -0.8, -0.85]
