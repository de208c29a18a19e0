"""Async rewards: many calls at once on one event loop, in a process that can be stopped."""

from __future__ import annotations

import asyncio
import functools
import os
import time

import pytest
from some_rewards import Judge, judged

from copris_lightning.errors import RewardError
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

PROMPT = Prompt("sum-7", text="3 + 4 =", answer="7")


@pytest.fixture(scope="module")
def scorer():
    made = RewardScorer(Scoring(Judge(), timeout_s=1.5))
    yield made
    made.close()


def score(scorer, *responses):
    """All at once, each for a prompt named after its response."""

    async def together():
        calls = [scorer(response, Prompt(response, text="?")) for response in responses]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(together())


def test_calls_are_out_together_on_one_loop_of_another_process(scorer):
    score(scorer, "pid")
    began = time.monotonic()
    assert score(scorer, *["sleep 1.0"] * 300) == [0.5] * 300
    assert time.monotonic() - began < 30  # one after the other it would be 300
    pids = set(score(scorer, *["pid"] * 20))
    assert len(pids) == 1
    assert pids != {os.getpid()}


def test_what_a_reward_opens_on_its_loop_stays_usable(scorer):
    assert score(scorer, *["session"] * 3) == [1.0] * 3
    assert score(scorer, "session") == [1.0]  # also from another loop of the caller's


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(judged, 0.25), (Judge().method, 0.25), (functools.partial(judged, bonus=0.5), 0.75)],
    ids=["function", "method", "partial"],
)
def test_async_functions_methods_and_partials_are_awaited(reward, expected):
    made = RewardScorer(Scoring(reward))
    assert score(made, "x") == [expected]
    made.close()


def test_a_call_past_its_limit_is_cancelled_and_the_others_go_on(scorer):
    worker, before = score(scorer, "pid", "cancelled")
    late, fine = score(scorer, "sleep 1000", "sleep 0.5")
    assert isinstance(late, RewardError)
    assert "'sleep 1000' took longer than task.scoring.timeout_s=1.5" in str(late)
    assert fine == 0.5
    assert score(scorer, "pid", "cancelled") == [worker, before + 1]


def test_a_call_that_nobody_waits_for_is_cancelled(scorer):
    async def cancel():
        before = await scorer("cancelled", PROMPT)
        call = asyncio.ensure_future(scorer("sleep 1.4", PROMPT))
        await asyncio.sleep(0.2)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        return await scorer("cancelled", PROMPT) - before

    assert asyncio.run(cancel()) == 1


def test_a_call_that_blocks_the_loop_is_named_and_its_worker_is_replaced(scorer):
    (worker,) = score(scorer, "pid")
    waits, blocks = score(scorer, "sleep 0.1", "block")
    for error in (waits, blocks):
        assert isinstance(error, RewardError)
        assert "reward of prompt 'block' took longer than" in str(error)
        assert "event loop" in str(error)
    assert str(waits).startswith("the reward of prompt 'sleep 0.1' lost its worker process")
    assert score(scorer, "pid") != [worker]


def test_a_call_that_ignores_its_cancellation_ends_with_its_worker(scorer):
    (error,) = score(scorer, "stubborn")
    assert isinstance(error, RewardError)
    assert "'stubborn' took longer than" in str(error)
    assert "goes on when it is cancelled" in str(error)
    assert score(scorer, "value 1") == [1.0]


def test_a_timeout_of_the_rewards_own_is_not_taken_for_the_limit(scorer):
    (error,) = score(scorer, "raise TimeoutError('the judge did not answer')")
    assert "raised TimeoutError('the judge did not answer')" in str(error)
    assert isinstance(error.__cause__, TimeoutError)


@pytest.mark.parametrize(
    "what", ["SystemExit(3)", "KeyboardInterrupt()", "asyncio.CancelledError()"]
)
def test_what_would_end_a_loop_is_the_rewards_error(scorer, what):
    (worker,) = score(scorer, "pid")
    (error,) = score(scorer, f"raise {what}")
    assert isinstance(error, RewardError)
    assert "raised " + what.rpartition(".")[2].split("(")[0] in str(error)
    assert score(scorer, "pid") == [worker]


def test_a_worker_that_dies_fails_all_its_calls_and_the_next_one_works(scorer):
    errors = score(scorer, "sleep 1.0", "exit")
    assert all(
        "ended its worker process (exit code 9; 2 calls were in it)" in str(e) for e in errors
    )
    assert score(scorer, "value 1") == [1.0]


def test_values_are_looked_at_as_a_plain_rewards_are(scorer):
    fine, text = score(scorer, "value True", "value '1.0'")
    assert fine == 1.0
    assert "returned '1.0', not a number" in str(text)
