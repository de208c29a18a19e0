"""Group-relative advantages against the formula in plain floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.advantage import group_relative

VALUES = st.floats(-100, 100)


def oracle(rows, *, normalize_std, eps=1e-6):
    result = []
    for row in rows:
        mean = math.fsum(row) / len(row)
        spread = math.sqrt(math.fsum((r - mean) ** 2 for r in row) / (len(row) - 1))
        scale = spread + eps if normalize_std else 1.0
        result.append([0.0 if min(row) == max(row) else (r - mean) / scale for r in row])
    return result


@st.composite
def reward_rows(draw):
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    row = st.lists(VALUES, min_size=size, max_size=size) | VALUES.map(lambda v: [v] * size)
    return draw(st.lists(row, min_size=groups, max_size=groups))


@settings(max_examples=150, deadline=None)
@given(reward_rows(), st.booleans())
def test_advantages_follow_the_formula(rows, normalize_std):
    actual = group_relative(torch.tensor(rows, dtype=torch.float64), normalize_std=normalize_std)
    assert actual.dtype is torch.float32
    expected = torch.tensor(oracle(rows, normalize_std=normalize_std), dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)


def test_advantages_of_known_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.866025, -0.866025] * 2])
    torch.testing.assert_close(group_relative(rewards, eps=0.0), expected, rtol=1e-5, atol=0)
    centered = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.5, -0.5, 0.5, -0.5]])
    assert torch.equal(group_relative(rewards, normalize_std=False), centered)


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-1e6, 1e6) | st.sampled_from([0.1, 0.7, 1 / 3]),
    st.integers(2, 33),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_equal_rewards_get_exactly_zero(value, size, normalize_std, dtype):
    """Also where the mean rounds off the value, which would be blown up by the tiny deviation."""
    rewards = torch.tensor([[value] * size, [value] * (size - 1) + [value + 1.0]], dtype=dtype)
    advantages = group_relative(rewards, normalize_std=normalize_std, eps=1e-30)
    assert torch.equal(advantages[0], torch.zeros(size))
    assert advantages[1, -1] > 0 > advantages[1, 0]


@settings(max_examples=100, deadline=None)
@given(reward_rows(), st.floats(-100, 100), st.booleans())
def test_a_constant_added_to_a_group_changes_nothing(rows, shift, normalize_std):
    rewards = torch.tensor(rows, dtype=torch.float64).round(decimals=3)
    before = group_relative(rewards, normalize_std=normalize_std)
    after = group_relative(rewards + shift, normalize_std=normalize_std)
    # Rewards that differ at all differ by 1e-3, so eps and rounding stay small beside that.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(reward_rows(), st.floats(0.01, 100))
def test_with_std_the_unit_of_reward_changes_nothing(rows, scale):
    rewards = torch.tensor(rows, dtype=torch.float64).round(decimals=3)
    before = group_relative(rewards, eps=1e-12)
    torch.testing.assert_close(group_relative(rewards * scale, eps=1e-12), before)


@settings(max_examples=50, deadline=None)
@given(reward_rows(), st.floats(0.01, 100))
def test_without_std_advantages_are_in_units_of_reward(rows, scale):
    rewards = torch.tensor(rows, dtype=torch.float64)
    before = group_relative(rewards, normalize_std=False)
    after = group_relative(rewards * scale, normalize_std=False)
    torch.testing.assert_close(after, before * scale, rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(reward_rows(), st.booleans())
def test_advantages_of_a_group_add_up_to_zero_and_ignore_other_groups(rows, normalize_std):
    rewards = torch.tensor(rows, dtype=torch.float64)
    together = group_relative(rewards, normalize_std=normalize_std)
    torch.testing.assert_close(together.sum(1), torch.zeros(len(rows)), rtol=0, atol=1e-4)
    for i in range(len(rows)):
        alone = group_relative(rewards[i : i + 1], normalize_std=normalize_std)
        assert torch.equal(alone[0], together[i])


def test_small_differences_survive_since_the_mean_is_taken_in_double():
    rewards = torch.tensor([[1.0, 1.0 + 1e-9]], dtype=torch.float64)
    expected = torch.tensor([[-0.5e-9, 0.5e-9]])
    torch.testing.assert_close(
        group_relative(rewards, normalize_std=False), expected, rtol=1e-5, atol=0
    )


def test_integer_rewards_are_taken():
    advantages = group_relative(torch.tensor([[0, 3]]), normalize_std=False)
    assert advantages.tolist() == [[-1.5, 1.5]]


@pytest.mark.parametrize("shape", [(4,), (3, 1), (1, 2, 2), (3, 0)])
def test_rewards_without_a_group_to_compare_with_are_refused(shape):
    with pytest.raises(ValueError, match="groups, G >= 2"):
        group_relative(torch.zeros(shape))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="finite"):
        group_relative(torch.tensor([[0.0, value]]))
