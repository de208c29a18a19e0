"""Real reward processes under a simulated engine: how long they take changes nothing."""

from __future__ import annotations

import pytest
from some_rewards import DoesWhatItIsTold, Judge, Restless, RestlessJudge

from copris_lightning.errors import RewardError
from copris_lightning.rollout.filters import ZeroVarianceFilter
from copris_lightning.rollout.rewards import RewardScorer, Scoring

SHAPE = {"cap": 24, "batch_groups": 3, "group_size": 4, "median": 6.0, "max_new_tokens": 24}


def history(rollout, reward, workers, **settings):
    """Everything that happened in some stages, and what was trained on."""
    scorer = RewardScorer(Scoring(reward, workers=workers))
    accept = ZeroVarianceFilter(1000, "reward")  # groups are dropped and replaced
    run = rollout(**SHAPE, scorer=scorer, accept=accept, **settings)
    run.stages(4)
    scorer.close()
    trained = [
        (t.prompt_id, t.sample, t.reward, t.tokens)
        for group in run.groups
        for t in group.trajectories
    ]
    return run.events, trained


@pytest.mark.parametrize("reward", [Restless(), RestlessJudge(0.02)], ids=["plain", "async"])
def test_runs_are_the_same_however_long_rewards_take_and_whoever_computes_them(rollout, reward):
    expected = history(rollout, Restless(0.0), workers=1)
    assert {"drop", "carry_over", "deliver"} <= {event.kind for event in expected[0]}
    assert {reward for _, _, reward, _ in expected[1]} == {0.0, 1.0}
    for workers in (3, 3, 1):
        assert history(rollout, reward, workers) == expected


def test_it_takes_no_virtual_time(rollout):
    scorer = RewardScorer(Scoring(Restless(0.05), workers=2))
    run = rollout(**SHAPE, scorer=scorer)
    run.collect()
    scorer.close()
    finish = {event.key: event.time for event in run.of_kind("finish")}
    scored = run.of_kind("score")
    assert scored
    assert all(event.time == finish[event.key] for event in scored)


def test_a_reward_that_hangs_fails_the_stage_within_its_limit(rollout):
    scorer = RewardScorer(Scoring(Judge(), timeout_s=1.0))
    run = rollout(
        **SHAPE,
        scorer=scorer,
        decode=lambda token_ids: "sleep 1000" if len(token_ids) > 3 else "value 1",
    )
    with pytest.raises(RewardError, match=r"'p\d+' took longer than.*timeout_s=1.0"):
        run.collect()
    assert run.buffer.in_flight == 0
    scorer.close()


@pytest.mark.parametrize("reward", [DoesWhatItIsTold(), Judge()], ids=["plain", "async"])
def test_a_reward_that_exits_fails_the_stage_and_not_the_thread(rollout, reward):
    scorer = RewardScorer(Scoring(reward))
    asked = iter(["raise SystemExit('no licence')"])
    run = rollout(**SHAPE, scorer=scorer, decode=lambda token_ids: next(asked, "value 1"))
    with pytest.raises(RewardError, match=r"'p\d+' raised SystemExit\('no licence'\)") as caught:
        run.collect()
    assert isinstance(caught.value.__cause__, SystemExit)
    assert run.buffer.in_flight == 0
    run.collect()  # the loop goes on
    scorer.close()
