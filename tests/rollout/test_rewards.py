"""Plain rewards for real: other processes, time limits, and errors that name the prompt."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import time
from collections.abc import Callable

import psutil
import pytest
from served import is_alive
from some_rewards import Alarmed, AlarmedJudge, DoesWhatItIsTold, Judge, TwoArguments, parity

from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.errors import ConfigurationError, RewardError
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

PROMPT = Prompt("sum-7", text="3 + 4 =", answer="7", extra={"level": 2})


@pytest.fixture(scope="module")
def scorer():
    """One process for all tests that need one."""
    made = RewardScorer(Scoring(DoesWhatItIsTold(), timeout_s=2.0))
    yield made
    made.close()


def score(scorer, response):
    return asyncio.run(scorer(response, PROMPT))


def children() -> set[psutil.Process]:
    return {p for p in psutil.Process().children() if is_alive(p)}


def wait_for(reached: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_plain_reward_runs_in_another_process_and_sees_the_whole_prompt(scorer):
    assert score(scorer, "pid") != os.getpid()
    assert score(scorer, "prompt") == 2.0


def test_workers_leave_signals_to_the_main_process(scorer):
    worker = score(scorer, "pid")
    assert score(scorer, "signals") == 1.0
    assert score(scorer, "pid") == worker


@pytest.mark.parametrize("reward", [Alarmed(), AlarmedJudge()], ids=["plain", "async"])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, VirtualClockLoop])
def test_a_reward_may_limit_itself_by_an_alarm_on_every_engines_loop(reward, new_loop):
    scorer, loop = RewardScorer(Scoring(reward)), new_loop()
    assert loop.run_until_complete(scorer("x", PROMPT)) == 0.25
    scorer.close()
    loop.close()


def test_an_exception_in_a_worker_names_the_prompt_and_is_the_cause(scorer):
    with pytest.raises(RewardError, match="reward of prompt 'sum-7' raised KeyError") as caught:
        score(scorer, "raise KeyError('no such answer')")
    assert isinstance(caught.value.__cause__, KeyError)
    assert "no such answer" in str(caught.value)
    assert "raise eval(rest)" in caught.value.__cause__.__notes__[0]


@pytest.mark.parametrize("error", ["SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()"])
def test_what_is_no_ordinary_exception_is_a_reward_error_too(scorer, error):
    worker = score(scorer, "pid")
    with pytest.raises(RewardError, match=r"prompt 'sum-7' raised " + error.split("(")[0]):
        score(scorer, f"raise {error}")
    assert score(scorer, "pid") == worker


def test_an_exception_that_cannot_be_sent_is_shown(scorer):
    with pytest.raises(RewardError, match=r"raised TwoArguments.*a is not b") as caught:
        score(scorer, "raise TwoArguments('a', 'b')")
    assert not isinstance(caught.value.__cause__, TwoArguments)
    assert "raise eval(rest)" in str(caught.value.__cause__)
    assert score(scorer, "prompt") == 2.0


def test_a_call_past_its_limit_is_killed_and_the_next_one_works(scorer):
    worker = score(scorer, "pid")  # the limit is for the call, not for the worker's start
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"'sum-7' took longer than.*timeout_s=2.0"):
        score(scorer, "hang")
    assert 2.0 <= time.monotonic() - began < 30
    assert score(scorer, "pid") != worker


def test_what_a_reward_has_started_ends_with_its_worker(scorer, tmp_path):
    with pytest.raises(RewardError, match="took longer"):
        score(scorer, f"fork {tmp_path / 'pid'}")
    started = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(started) or not is_alive(psutil.Process(started)))


def test_programs_that_a_reward_has_started_end_with_its_worker(scorer, tmp_path):
    shell = f"echo $$ > {tmp_path / 'pid'}; exec sleep 777"
    with pytest.raises(RewardError, match="took longer"):
        score(scorer, f"value __import__('subprocess').run({shell!r}, shell=True)")
    started = int((tmp_path / "pid").read_text())
    wait_for(lambda: not psutil.pid_exists(started) or not is_alive(psutil.Process(started)))


@pytest.mark.parametrize(("how", "says"), [("exit", "exit code 9"), ("crash", "signal 11")])
def test_a_worker_that_dies_is_an_error_and_the_next_call_works(scorer, how, says):
    with pytest.raises(RewardError, match=rf"'sum-7' ended its worker process \({says}"):
        score(scorer, how)
    assert score(scorer, "prompt") == 2.0


def test_a_worker_that_died_between_two_calls_is_replaced(scorer):
    worker = psutil.Process(int(score(scorer, "pid")))
    worker.kill()
    wait_for(lambda: not worker.is_running())
    assert score(scorer, "pid") != worker.pid


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


def test_a_call_that_nobody_waits_for_makes_room_for_others(scorer):
    async def cancel_one_of_two():
        running = asyncio.ensure_future(scorer("hang", PROMPT))
        waiting = asyncio.ensure_future(scorer("hang", PROMPT))
        await asyncio.sleep(0.2)
        waiting.cancel()
        running.cancel()
        await asyncio.wait([running, waiting])
        return await scorer("prompt", PROMPT)

    assert asyncio.run(cancel_one_of_two()) == 2.0


def test_a_prompt_that_cannot_be_sent_is_an_error_that_names_it(scorer):
    with pytest.raises(RewardError, match="prompt 'odd' cannot be sent"):
        asyncio.run(scorer("pid", Prompt("odd", text="?", extra={"f": lambda: 1})))
    assert score(scorer, "prompt") == 2.0


def test_all_workers_can_be_started_before_the_first_call():
    before = children()
    scorer = RewardScorer(Scoring(DoesWhatItIsTold(), workers=2))
    asyncio.run(scorer.start())
    workers = children() - before
    assert len(workers) == 2
    assert score(scorer, "pid") in {float(worker.pid) for worker in workers}
    scorer.close()
    assert children() <= before


def test_closing_leaves_no_process_and_may_be_repeated():
    before = children()
    scorer = RewardScorer(Scoring(parity))
    scorer.close()  # before any process was needed
    assert score(scorer, "four") == 0.0
    assert len(children() - before) == 1
    scorer.close()
    scorer.close()
    assert children() <= before
    assert score(scorer, "four") == 0.0  # a session may follow another
    scorer.close()


def test_closing_does_not_wait_for_a_busy_worker():
    scorer = RewardScorer(Scoring(DoesWhatItIsTold(), timeout_s=100.0))

    async def close_in_the_middle():
        await scorer.start()
        call = asyncio.ensure_future(scorer("hang", PROMPT))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        scorer.close()
        await asyncio.wait([call])
        return call.cancelled(), time.monotonic() - began

    cancelled, seconds = asyncio.run(close_in_the_middle())
    assert cancelled
    assert seconds < 10


def test_a_scorer_is_named_after_its_reward():
    assert RewardScorer(Scoring(Judge())).name == "Judge"
    assert RewardScorer(Scoring(parity)).name == "parity"


# -- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [Judge, "math", None, 3])
def test_a_reward_must_be_a_callable_instance(reward):
    with pytest.raises(ConfigurationError, match=r"^reward: .*not callable") as caught:
        RewardScorer(Scoring(reward))
    assert repr(reward) in str(caught.value)


def unpicklable() -> dict[str, object]:
    async def judge(response, prompt):
        return 1.0

    class Local:
        def __call__(self, response, prompt):
            return 1.0

    class Stubborn(Alarmed):
        def __getstate__(self):
            raise OSError("not this file")

    return {
        "lambda": lambda response, prompt: 1.0,
        "async closure": judge,
        "local class": Local(),
        "method of a local class": Local().__call__,
        "partial": functools.partial(judge, answer=1),
        "its own error": Stubborn(),
    }


@pytest.mark.parametrize("kind", unpicklable())
def test_a_reward_must_be_picklable(kind):
    with pytest.raises(ConfigurationError, match=r"^reward: .*top level of a module"):
        RewardScorer(Scoring(unpicklable()[kind]))


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.nan])
def test_the_time_limit_must_be_above_zero(timeout_s):
    with pytest.raises(ConfigurationError, match=f"^timeout_s={timeout_s} "):
        RewardScorer(Scoring(parity, timeout_s=timeout_s))


@pytest.mark.parametrize("workers", [0, -2])
def test_there_must_be_a_worker(workers):
    with pytest.raises(ConfigurationError, match=f"^workers={workers} "):
        RewardScorer(Scoring(parity, workers=workers))
