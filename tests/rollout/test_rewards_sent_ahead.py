"""Plain calls are sent ahead: a busy trainer does not hold them up, and they fail for no other."""

from __future__ import annotations

import asyncio
import ctypes
import threading
import time

import pytest
from some_rewards import DoesWhatItIsTold, judged

from copris_lightning.errors import RewardError
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

CLOCK = "value __import__('time').monotonic()"


def calls(scorer, *responses):
    """Begun in this order, each for a prompt named after its response."""
    return [asyncio.ensure_future(scorer(r, Prompt(r, text="?"))) for r in responses]


def score(scorer, *responses):
    async def together():
        return await asyncio.gather(*calls(scorer, *responses), return_exceptions=True)

    return asyncio.run(together())


def keep_the_lock(seconds: float) -> float:
    """Have no other thread of this process run Python for some time.

    Returns:
        when that ended.
    """
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return time.monotonic()


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread wakes it."""

    woken = 0

    def call_soon_threadsafe(self, *args, **kwargs):
        self.woken += threading.current_thread() is not threading.main_thread()
        return super().call_soon_threadsafe(*args, **kwargs)


@pytest.fixture
def made():
    """Makes scorers, and closes them."""
    scorers = []

    def make(reward=None, **settings):
        scorers.append(RewardScorer(Scoring(reward or DoesWhatItIsTold(), **settings)))
        asyncio.run(scorers[-1].start())
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_go_on_while_the_trainer_is_busy_and_it_hears_of_all_at_once(made, workers):
    scorer, loop = made(workers=workers), CountingLoop()

    async def burst():
        out = calls(scorer, *[CLOCK] * 50)
        await asyncio.sleep(0)
        loop.woken = 0
        released = keep_the_lock(1.5)
        return await asyncio.gather(*out), released

    called, released = loop.run_until_complete(burst())
    loop.close()
    assert max(called) < released
    assert loop.woken <= 5  # some answers may have come before


def test_an_answer_that_came_in_time_counts_however_late_it_is_read(made):
    scorer = made(timeout_s=0.6)

    async def burst():
        out = calls(scorer, *["prompt"] * 20)
        await asyncio.sleep(0)
        keep_the_lock(2.0)
        return await asyncio.gather(*out)

    assert len(asyncio.run(burst())) == 20


def test_the_limit_is_for_one_call_from_when_it_is_begun(made):
    wait = "value __import__('time').sleep(0.4)"
    assert len([v for v in score(made(timeout_s=1.5), *[wait] * 6) if v != v]) == 6


@pytest.mark.parametrize(
    ("what", "says"), [("hang", "took longer than"), ("exit", "ended its worker process")]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_calls_that_were_not_begun_outlive_the_worker_that_had_them(made, what, says, workers):
    scorer = made(workers=workers, timeout_s=2.0)
    values = score(scorer, "value 1", what, *[f"value {n}" for n in range(100)])
    failed = values.pop(1)
    assert isinstance(failed, RewardError)
    assert f"prompt '{what}' {says}" in str(failed)
    assert values == [1, *range(100)]


def test_none_waits_behind_a_long_call_while_another_worker_is_free(made):
    scorer = made(workers=2)

    async def behind():
        began = time.monotonic()
        long, *quick = calls(scorer, "value __import__('time').sleep(4)", *["prompt"] * 20)
        await asyncio.gather(*quick)
        return time.monotonic() - began, long.done(), await long

    seconds, was_done, _ = asyncio.run(behind())
    assert not was_done
    assert seconds < 4


def test_a_call_that_is_cancelled_before_it_is_begun_is_never_made(made, tmp_path):
    scorer, witness = made(), tmp_path / "called"

    async def cancel():
        first, second = calls(
            scorer, "value __import__('time').sleep(0.05)", f"value open({str(witness)!r}, 'w')"
        )
        await asyncio.sleep(0)
        second.cancel()
        await first
        assert await asyncio.gather(*calls(scorer, "value 1", "value 2")) == [1, 2]
        assert second.cancelled()

    asyncio.run(cancel())
    assert not witness.exists()


@pytest.mark.parametrize("reward", [None, judged], ids=["plain", "async"])
def test_a_call_larger_than_what_a_connection_holds_arrives(made, reward):
    values = score(made(reward), *["x" * (1 << 20)] * 8)
    assert values == [1 << 20 if reward is None else 0.25] * 8


def test_calls_come_from_several_loops_at_once(made):
    scorer = made()
    values: list[object] = []
    threads = [
        threading.Thread(target=lambda n=n: values.extend(score(scorer, *[f"value {n}"] * 30)))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(values) == [0] * 30 + [1] * 30 + [2] * 30
