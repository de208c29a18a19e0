"""The background loop: results, errors and interruptions cross the thread in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time

import pytest

from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.rollout import loop_thread
from copris_lightning.rollout.loop_thread import LoopThread, StuckError


@pytest.fixture
def thread():
    made = LoopThread(asyncio.new_event_loop)
    yield made
    made.close()


def test_the_result_comes_back_from_the_other_thread(thread):
    async def work():
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert thread.call(work()) == "copris-rollout"


def test_calls_share_one_loop(thread):
    async def loop_id():
        return id(asyncio.get_running_loop())

    assert thread.call(loop_id()) == thread.call(loop_id())


def test_an_exception_comes_back_as_it_is_and_the_loop_goes_on(thread):
    error = KeyError("lost")

    async def fail():
        raise error

    with pytest.raises(KeyError) as caught:
        thread.call(fail())
    assert caught.value is error

    async def fine():
        return 1

    assert thread.call(fine()) == 1


def test_on_wait_is_called_in_the_calling_thread_again_and_again(thread):
    calls = []
    thrice = threading.Event()

    def note():
        calls.append(threading.current_thread())
        if len(calls) == 3:
            thrice.set()

    async def until_called_thrice():
        await asyncio.get_running_loop().run_in_executor(None, thrice.wait, 10)

    thread.call(until_called_thrice(), every_s=0.01, on_wait=note)
    assert len(calls) >= 3
    assert set(calls) == {threading.current_thread()}


def test_on_wait_is_not_called_for_what_is_quickly_done(thread):
    calls = []

    async def quick():
        return 5

    assert thread.call(quick(), every_s=5.0, on_wait=lambda: calls.append(1)) == 5
    assert calls == []


class Stop(Exception):
    """What a callback raises to end the run."""


@pytest.mark.parametrize("interruption", [Stop, KeyboardInterrupt, SystemExit])
def test_an_interruption_while_waiting_cancels_and_awaits_the_cleanup(thread, interruption):
    log = []

    async def work():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            log.append("cancelled")
            raise
        finally:
            await asyncio.sleep(0.1)  # closing a connection, say
            log.append("cleaned up")

    def interrupt():
        raise interruption("now")

    with pytest.raises(interruption, match="now"):
        thread.call(work(), every_s=0.01, on_wait=interrupt)
    assert log == ["cancelled", "cleaned up"]


def test_an_error_in_the_cleanup_does_not_replace_the_interruption(thread):
    async def work():
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("in the cleanup")

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        thread.call(work(), every_s=0.01, on_wait=interrupt)


def test_work_that_ended_before_the_cancel_arrived_does_not_hide_the_interruption(thread):
    release = threading.Event()
    done = threading.Event()

    async def work():
        release.wait(10)
        done.set()
        return 1

    def interrupt():
        release.set()
        assert done.wait(10)
        raise Stop

    with pytest.raises(Stop):
        thread.call(work(), every_s=0.01, on_wait=interrupt)


def test_the_thread_can_be_used_after_an_interruption(thread):
    def interrupt():
        raise Stop

    with pytest.raises(Stop):
        thread.call(asyncio.sleep(3600), every_s=0.01, on_wait=interrupt)
    assert thread.call(asyncio.sleep(0, "fine")) == "fine"


def test_a_coroutine_that_cancels_itself_is_a_cancelled_call(thread):
    async def work():
        asyncio.current_task().cancel()
        await asyncio.sleep(1)

    with pytest.raises(asyncio.CancelledError):
        thread.call(work())


def test_closing_ends_the_thread_and_may_be_repeated(rollout_threads):
    made = LoopThread(asyncio.new_event_loop)
    made.call(asyncio.sleep(0))
    assert len(rollout_threads()) == 1
    made.close()
    assert rollout_threads() == []
    made.close()


def test_closing_cancels_tasks_left_behind_and_waits_for_their_cleanup():
    made = LoopThread(asyncio.new_event_loop)
    log = []

    async def left_behind():
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            log.append("cleaned up")

    async def leave():
        task = asyncio.create_task(left_behind())
        await asyncio.sleep(0)
        return task

    task = made.call(leave())
    made.close()
    assert log == ["cleaned up"]
    assert task.cancelled()


def test_it_runs_on_the_loop_it_is_given_virtual_time_included():
    made = LoopThread(VirtualClockLoop)
    began = time.monotonic()

    async def a_day():
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert made.call(a_day()) == pytest.approx(86_400)
    # Its second call must reach a loop on which nothing else is going on.
    assert made.call(a_day()) == pytest.approx(2 * 86_400)
    made.close()
    assert time.monotonic() - began < 30


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_ends_by_itself_is_noticed():
    """asyncio lets a SystemExit that a task raises end the loop: nobody may wait for it then."""

    async def leave():
        raise SystemExit(3)

    async def wait_for_it():
        await asyncio.create_task(leave())

    thread = LoopThread(asyncio.new_event_loop)
    with pytest.raises(RuntimeError, match="the rollout thread ended"):
        thread.call(wait_for_it(), every_s=0.05)
    thread.close()
    thread.close()
    gc.collect()  # the task that nobody asks is reported here, not within another test


@pytest.fixture
def short_cleanup(monkeypatch):
    monkeypatch.setattr(loop_thread, "CLEANUP_S", 0.3)


class Stubborn:
    """Work that goes on when it is cancelled, until it is released."""

    def __init__(self):
        self.released = threading.Event()

    async def __call__(self):
        while not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("interruption", [Stop, KeyboardInterrupt])
def test_work_that_ignores_its_cancellation_is_left_behind(short_cleanup, thread, interruption):
    work = Stubborn()

    def interrupt():
        raise interruption

    with pytest.raises(interruption) as caught:
        thread.call(work(), every_s=0.05, on_wait=interrupt)
    assert "was cancelled and has not ended after 0.3 s" in caught.value.__notes__[0]
    work.released.set()


def test_work_that_blocks_the_loop_does_not_hold_an_interruption_up(short_cleanup, thread):
    released = threading.Event()

    async def block():
        released.wait(30)

    def interrupt():
        raise Stop

    with pytest.raises(Stop):
        thread.call(block(), every_s=0.05, on_wait=interrupt)
    released.set()


def test_a_call_with_a_deadline_is_cancelled_when_it_has_passed(thread):
    async def too_long():
        await asyncio.sleep(600)

    with pytest.raises(StuckError, match=r"not done with .*too_long after 0\.2 s"):
        thread.call(too_long(), every_s=0.05, timeout_s=0.2)
    assert thread.call(asyncio.sleep(0, 1), timeout_s=10) == 1


def test_closing_a_blocked_loop_leaves_its_thread_behind(short_cleanup, caplog):
    made = LoopThread(asyncio.new_event_loop)
    released = threading.Event()

    async def block():
        released.wait(30)

    def interrupt():
        raise Stop

    with pytest.raises(Stop):
        made.call(block(), every_s=0.05, on_wait=interrupt)
    made.close()
    assert "the rollout thread has not ended after 0.3 s" in caplog.text
    released.set()
    made._thread.join(10)
    made.close()
