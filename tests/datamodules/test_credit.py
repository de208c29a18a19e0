"""From rewards to advantages: quarantine, truncation and the soft penalty."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trajectories import trajectory

from copris_lightning.core.estimator.advantage import dr_grpo, grpo, rloo
from copris_lightning.core.outcome import TRUNCATED, Outcome, Verdict
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.datamodules.credit import mean_reward, quarantine, set_advantages
from copris_lightning.datamodules.settings import Credit
from copris_lightning.errors import ConfigurationError, QuarantineError

SAMPLING = Sampling(max_new_tokens=10)


def group(rewards, lengths=None, group_id=0):
    lengths = lengths or [4] * len(rewards)
    rows = []
    for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True)):
        end = "length" if n == SAMPLING.max_new_tokens else "stop"
        chunk = (0, [5] * n, [-1.0] * n)
        rows.append(trajectory(chunk, sample=i, group=group_id, end=end, reward=reward))
    return PromptGroup(group_id, group_id, rows, 0)


def advantages(group):
    return [t.credit.advantage for t in group.trajectories]


@pytest.mark.parametrize("advantage", [grpo, dr_grpo, rloo])
def test_advantages_go_to_the_trajectories_that_earned_them(advantage):
    groups = [group([0.1, 0.1, 0.1, 0.1]), group([1.0, 0.0, 0.5, 0.0], group_id=1)]
    quarantine(groups, 0.0)
    set_advantages(groups, Credit(advantage), SAMPLING)
    assert advantages(groups[0]) == [0.0] * 4
    expected = advantage(torch.tensor([[1.0, 0.0, 0.5, 0.0]], dtype=torch.float64))[0]
    assert advantages(groups[1]) == expected.tolist()
    groups[1].trajectories[0].outcome = Outcome("stop")
    with pytest.raises(AssertionError):
        set_advantages(groups, Credit(advantage), SAMPLING)


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf]), min_size=2, max_size=6))
def test_the_rest_of_a_group_is_compared_without_its_quarantined(rewards):
    one = group(rewards)
    quarantine([one], 1.0)
    set_advantages([one], Credit(dr_grpo), SAMPLING)
    finite = [r for r in rewards if math.isfinite(r)]
    for t, reward in zip(one.trajectories, rewards, strict=True):
        if not math.isfinite(reward):
            assert t.is_quarantined
            assert t.excluded.reason == f"its reward is {reward}"
            assert t.credit.advantage == 0.0
        else:
            assert t.excluded is None
            alone = len(finite) < 2
            expected = 0.0 if alone else t.reward - sum(finite) / len(finite)
            assert t.credit.advantage == pytest.approx(expected, abs=1e-7)
    assert mean_reward(one.trajectories) == pytest.approx(
        sum(finite) / len(finite) if finite else math.nan, nan_ok=True
    )


@pytest.mark.parametrize("where", ["engine", "trainer", "proximal"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_logprob_that_is_not_finite_is_quarantined_by_name(where, value):
    one = group([0.0, 1.0, 0.0, 1.0])
    for source in ("trainer", "proximal"):
        one.trajectories[2].add_logprobs(source, [-1.0] * 4)
    one.trajectories[2].logprobs[where][1] = value
    quarantine([one], 0.25)
    assert [t.is_quarantined for t in one.trajectories] == [False, False, True, False]
    assert "token 1" in one.trajectories[2].excluded.reason
    assert str(value) in one.trajectories[2].excluded.reason


def test_past_the_share_it_is_an_error_that_names_them():
    groups = [group([math.nan, 1.0, 0.0, 1.0]), group([0.0, math.nan, math.nan, 1.0], group_id=1)]
    quarantine(groups, 3 / 8)
    with pytest.raises(QuarantineError) as caught:
        quarantine(groups, 0.25)
    for part in ("3 of the batch's 8", "max_quarantined=0.25", "'p0'", "'p1'", "reward is nan"):
        assert part in str(caught.value)


def test_truncated_responses_are_masked_on_demand_and_still_compared():
    one = group([0.0, 1.0, 0.0, 1.0], [10, 4, 9, 10])
    set_advantages([one], Credit(dr_grpo), SAMPLING)
    assert [t.excluded for t in one.trajectories] == [None] * 4
    before = advantages(one)
    set_advantages([one], Credit(dr_grpo, truncated="mask"), SAMPLING)
    assert [t.excluded for t in one.trajectories] == [TRUNCATED, None, None, TRUNCATED]
    assert advantages(one) == before
    assert not any(t.is_quarantined for t in one.trajectories)


def test_the_soft_penalty_changes_advantages_and_not_rewards():
    one = group([1.0, 1.0, 1.0, 1.0], [5, 6, 8, 10])
    set_advantages([one], Credit(dr_grpo, overlong_cushion=0.5), SAMPLING)
    shaped = [1.0, 1.0 - 0.2, 1.0 - 0.6, 0.0]
    expected = [r - sum(shaped) / 4 for r in shaped]
    assert advantages(one) == pytest.approx(expected, abs=1e-7)
    assert [t.reward for t in one.trajectories] == [1.0] * 4


@pytest.mark.parametrize(
    "advantage",
    [
        lambda rewards: (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True),
        lambda rewards: rewards * 1e40,
        lambda rewards: rewards[:, :1],
    ],
)
def test_an_advantage_that_is_not_finite_or_misshapen_is_refused(advantage):
    with pytest.raises(ConfigurationError, match=r"credit.advantage=.*\[1, 4\]"):
        set_advantages([group([1.0, 1.0, 1.0, 1.0])], Credit(advantage), SAMPLING)


def test_an_advantage_sees_all_groups_of_a_batch_at_once():
    seen = []

    def spy(rewards):
        seen.append(rewards.tolist())
        return dr_grpo(rewards)

    groups = [group([0.0, 1.0, 0.0, 1.0], group_id=i) for i in range(3)]
    groups[1].trajectories[2].judge(Verdict.of(math.nan))
    quarantine(groups, 1.0)
    set_advantages(groups, Credit(spy), SAMPLING)
    assert seen == [[[0.0, 1.0, 1.0]], [[0.0, 1.0, 0.0, 1.0]] * 2]
    assert advantages(groups[1]) == pytest.approx([-2 / 3, 1 / 3, 0.0, 1 / 3])


def test_quarantining_again_forgets_what_was_mended():
    one = group([0.0, math.nan, 0.0, 1.0])
    quarantine([one], 1.0)
    random.Random(0).shuffle(one.trajectories)
    for t in one.trajectories:
        t.judge(Verdict(0.0))
    quarantine([one], 0.0)
    assert [t.excluded for t in one.trajectories] == [None] * 4
