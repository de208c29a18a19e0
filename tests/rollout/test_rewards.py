"""Rewards for real: other processes, time limits, and errors that name the prompt."""

from __future__ import annotations

import asyncio
import functools
import math
import multiprocessing
import os
import sys
import time
from importlib import import_module

import pytest

from copris_lightning.errors import ConfigurationError, RewardError
from copris_lightning.rollout.rewards import Prompt, RewardScorer

PROMPT = Prompt("sum-7", text="3 + 4 =", answer="7", extra={"level": 2})

# A worker process imports the reward's class by name, so it needs a module of its own: test files
# cannot be imported by name in every import mode.
MODULE = '''
import os, signal, time

class Reward:
    """Does what the response says."""

    def __call__(self, response, prompt):
        if response == "pid":
            return os.getpid()
        if response == "prompt":
            return float(prompt.id == "sum-7" and prompt.answer == "7" and prompt.extra["level"])
        if response == "raise":
            raise KeyError("no such answer")
        if response == "hang":
            time.sleep(3600)
        if response == "exit":
            os._exit(9)
        if response == "ignores interrupt":
            return float(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
        return {"none": None, "text": "good", "list": [1.0, 0.0], "nan": float("nan")}[response]

def function(response, prompt):
    return len(response)
'''


class AsyncReward:
    """Runs on the event loop; returns or raises what it is given."""

    def __init__(self, outcome=1.0, seconds=0.0):
        self.outcome = outcome
        self.seconds = seconds

    async def __call__(self, response, prompt):
        await asyncio.sleep(self.seconds)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def method(self, response, prompt):
        return self.outcome


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """The module above, importable here and in worker processes."""
    folder = tmp_path_factory.mktemp("rewards")
    folder.joinpath("rewards_of_the_tests.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield import_module("rewards_of_the_tests")
    sys.path.remove(str(folder))
    del sys.modules["rewards_of_the_tests"]


@pytest.fixture(scope="module")
def scorer(rewards):
    """One pool of processes for all tests that need one."""
    made = RewardScorer(rewards.Reward(), timeout_s=2.0)
    yield made
    made.close()


def score(scorer, response):
    return asyncio.run(scorer(response, PROMPT))


@pytest.fixture
def other_workers(scorer):
    """The shared pool's processes, once it has replaced any that a test has killed."""
    score(scorer, "prompt")
    return set(multiprocessing.active_children())


def test_a_plain_reward_runs_in_another_process_and_sees_the_whole_prompt(scorer):
    assert score(scorer, "pid") != os.getpid()
    assert score(scorer, "prompt") == 2.0


def test_workers_leave_interrupts_to_the_main_process(scorer):
    assert score(scorer, "ignores interrupt") == 1.0


def test_an_exception_in_a_worker_names_the_prompt_and_is_the_cause(scorer):
    with pytest.raises(RewardError, match="reward of prompt 'sum-7' raised KeyError") as caught:
        score(scorer, "raise")
    assert isinstance(caught.value.__cause__, KeyError)
    assert "no such answer" in str(caught.value)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ("text", "returned 'good', not a number"),
        ("list", r"returned \[1.0, 0.0\], not a number"),
    ],
)
def test_what_is_no_number_is_an_error_that_shows_it(scorer, response, says):
    with pytest.raises(RewardError, match=f"prompt 'sum-7' {says}"):
        score(scorer, response)


def test_a_call_past_its_limit_is_killed_and_the_next_one_works(scorer):
    score(scorer, "prompt")  # the limit is for the call, not for the worker's start
    worker = int(score(scorer, "pid"))
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'sum-7' took longer than.*reward_timeout_s=2.0"):
        score(scorer, "hang")
    assert 2.0 <= time.monotonic() - began < 30
    assert int(score(scorer, "pid")) != worker
    assert not os.path.exists(f"/proc/{worker}/fd")


def test_a_worker_that_dies_is_an_error_and_the_next_call_works(scorer):
    with pytest.raises(RewardError, match="'sum-7' raised ProcessExpired"):
        score(scorer, "exit")
    assert score(scorer, "prompt") == 2.0


def test_the_event_loop_goes_on_while_a_worker_computes(scorer):
    async def both():
        slow = asyncio.ensure_future(scorer("hang", PROMPT))
        ticks = 0
        while not slow.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(RewardError):
            await slow
        return ticks

    assert asyncio.run(both()) > 20


def test_all_workers_can_be_started_before_the_first_call(rewards, other_workers):
    scorer = RewardScorer(rewards.Reward(), workers=2)

    async def start_and_look():
        await scorer.start()
        return set(multiprocessing.active_children()) - other_workers

    workers = asyncio.run(start_and_look())
    assert len(workers) == 2
    assert score(scorer, "pid") in {float(worker.pid) for worker in workers}
    scorer.close()
    assert set(multiprocessing.active_children()) <= other_workers


def test_closing_leaves_no_process_and_may_be_repeated(rewards, other_workers):
    scorer = RewardScorer(rewards.function)
    scorer.close()  # before any process was needed
    assert score(scorer, "four") == 4.0
    workers = set(multiprocessing.active_children()) - other_workers
    assert len(workers) == 1
    scorer.close()
    scorer.close()
    assert set(multiprocessing.active_children()) <= other_workers
    assert not any(worker.is_alive() for worker in workers)


# -- coroutines ----------------------------------------------------------------------------


def test_an_async_reward_runs_on_the_loop_and_needs_no_process(loop):
    before = set(multiprocessing.active_children())
    scorer = RewardScorer(AsyncReward(0.5, seconds=3.0))
    loop.run_until_complete(scorer.start())
    assert loop.run_until_complete(scorer("x", PROMPT)) == 0.5
    assert loop.time() == pytest.approx(3.0)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.parametrize("kind", ["function", "method", "partial"])
def test_async_functions_methods_and_partials_are_awaited(loop, kind):
    async def function(response, prompt, bonus=0.0):
        return 0.25 + bonus

    reward = {
        "function": function,
        "method": AsyncReward(0.25).method,
        "partial": functools.partial(function, bonus=0.0),
    }[kind]
    assert loop.run_until_complete(RewardScorer(reward)("x", PROMPT)) == 0.25


def test_an_async_reward_past_its_limit_is_cancelled(loop):
    scorer = RewardScorer(AsyncReward(seconds=1e9), timeout_s=12.0)
    with pytest.raises(RewardError, match=r"'sum-7' took longer than.*reward_timeout_s=12.0"):
        loop.run_until_complete(scorer("x", PROMPT))
    assert loop.time() == pytest.approx(12.0)


def test_a_timeout_of_the_rewards_own_is_not_taken_for_the_limit(loop):
    cause = TimeoutError("the judge did not answer")
    with pytest.raises(RewardError, match=r"raised TimeoutError.*judge did not answer") as caught:
        loop.run_until_complete(RewardScorer(AsyncReward(cause))("x", PROMPT))
    assert caught.value.__cause__ is cause


@pytest.mark.parametrize(
    "value", ["good", "", [1.0], {}, 1j, 10**400], ids=lambda value: repr(value)[:12]
)
def test_a_value_that_is_no_number_is_a_reward_error(loop, value):
    with pytest.raises(RewardError, match=r"'sum-7' returned .*, not a number"):
        loop.run_until_complete(RewardScorer(AsyncReward(value))("x", PROMPT))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), float("-inf")])
def test_no_verdict_is_passed_on_for_the_trajectory_to_be_quarantined(loop, value):
    reward = loop.run_until_complete(RewardScorer(AsyncReward(value))("x", PROMPT))
    assert not math.isfinite(reward)
    assert reward == value or math.isnan(reward)


def test_a_worker_passes_no_verdict_on_too(scorer):
    assert math.isnan(score(scorer, "none"))
    assert math.isnan(score(scorer, "nan"))


def test_a_scorer_is_named_after_its_reward():
    assert RewardScorer(AsyncReward(1.0)).name == "AsyncReward"


@pytest.mark.parametrize("value", [1, True, 0.0, -2.5])
def test_numbers_become_floats(loop, value):
    reward = loop.run_until_complete(RewardScorer(AsyncReward(value))("x", PROMPT))
    assert (reward, type(reward)) == (float(value), float)


def test_cancelling_a_call_is_no_reward_error(loop):
    async def cancelled():
        task = asyncio.ensure_future(RewardScorer(AsyncReward(seconds=100.0))("x", PROMPT))
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert loop.run_until_complete(cancelled())


# -- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [AsyncReward, "math", None, 3])
def test_a_reward_must_be_a_callable_instance(reward):
    with pytest.raises(
        ConfigurationError, match=r"data.init_args.reward: .*not callable"
    ) as caught:
        RewardScorer(reward)
    assert repr(reward) in str(caught.value)


def test_a_reward_for_processes_must_be_picklable():
    with pytest.raises(ConfigurationError, match=r"data.init_args.reward: .*top level of a module"):
        RewardScorer(lambda response, prompt: 1.0)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan")])
def test_the_time_limit_must_be_above_zero(timeout_s):
    with pytest.raises(ConfigurationError, match=f"data.init_args.reward_timeout_s={timeout_s} "):
        RewardScorer(AsyncReward(), timeout_s=timeout_s)


@pytest.mark.parametrize("workers", [0, -2])
def test_there_must_be_a_worker(workers):
    with pytest.raises(ConfigurationError, match=f"data.init_args.reward_workers={workers} "):
        RewardScorer(AsyncReward(), workers=workers)
