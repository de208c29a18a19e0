"""The event loop on virtual time."""

from __future__ import annotations

import asyncio
import functools
import threading
import time

import pytest


def test_sleeping_for_days_takes_no_real_time(loop):
    began = time.monotonic()
    loop.run_until_complete(asyncio.sleep(1e6))
    assert loop.time() == pytest.approx(1e6)
    assert time.monotonic() - began < 5


def test_timers_run_in_order_of_their_deadlines_each_at_its_own_time(loop):
    log = []

    async def sleeper(seconds):
        await asyncio.sleep(seconds)
        log.append((seconds, loop.time()))

    async def all_of_them():
        await asyncio.gather(*map(sleeper, (30.0, 0.5, 7.0, 0.0, 1000.0)))

    loop.run_until_complete(all_of_them())
    assert [seconds for seconds, _ in log] == [0.0, 0.5, 7.0, 30.0, 1000.0]
    assert [at for _, at in log] == pytest.approx([0.0, 0.5, 7.0, 30.0, 1000.0])


def test_the_clock_stands_still_while_there_is_something_to_do(loop):
    async def busy():
        for _ in range(1000):
            await asyncio.sleep(0)
        return loop.time()

    assert loop.run_until_complete(busy()) == 0.0


def test_timeouts_are_in_virtual_time(loop):
    async def limited():
        async with asyncio.timeout(3600):
            await loop.create_future()

    with pytest.raises(TimeoutError):
        loop.run_until_complete(limited())
    assert loop.time() == pytest.approx(3600)


def test_a_call_from_another_thread_arrives_while_the_loop_waits_without_spinning(loop):
    async def wait_for_other_thread():
        future = loop.create_future()
        wake = functools.partial(loop.call_soon_threadsafe, future.set_result, "hello")
        threading.Timer(0.5, wake).start()
        return await future

    began = time.thread_time()
    assert loop.run_until_complete(wait_for_other_thread()) == "hello"
    assert loop.time() == 0.0
    assert time.thread_time() - began < 0.1


def test_the_clock_stands_still_while_work_for_an_executor_is_out(loop):
    async def work():
        timer = asyncio.ensure_future(asyncio.sleep(0.001))
        back = await loop.run_in_executor(None, lambda: (time.sleep(0.2), threading.get_ident()))
        assert back[1] != threading.get_ident()
        return timer.done(), loop.time(), await timer

    began = time.thread_time()
    assert loop.run_until_complete(work()) == (False, 0.0, None)
    assert time.thread_time() - began < 0.1  # it waits without spinning


@pytest.mark.parametrize("slowest", [0, 1, 2])
def test_what_comes_back_is_handed_over_together_and_in_the_order_of_sending(loop, slowest):
    log = []

    async def call(name, seconds):
        log.append(await loop.run_in_executor(None, lambda: (time.sleep(seconds), name)[1]))
        if name < 10:  # what is sent while others are out is handed over after them
            await call(name + 10, 0.0)

    async def tick():
        await asyncio.sleep(0.5)
        log.append("tick")

    async def all_of_them():
        await asyncio.gather(*(call(i, 0.1 * (i == slowest)) for i in range(3)), tick())

    loop.run_until_complete(all_of_them())
    assert log == [0, 1, 2, 10, 11, 12, "tick"]
    assert loop.time() == pytest.approx(0.5)


def test_work_that_nobody_waits_for_does_not_hold_the_clock(loop):
    release = threading.Event()

    async def work():
        call = loop.run_in_executor(None, release.wait, 60)
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.sleep(3.0)
        return loop.time()

    began = time.monotonic()
    assert loop.run_until_complete(work()) == pytest.approx(3.0)
    assert time.monotonic() - began < 30
    release.set()


def test_a_call_from_another_thread_arrives_while_work_is_out(loop):
    release = threading.Event()

    async def work():
        threading.Timer(0.1, loop.call_soon_threadsafe, (release.set,)).start()
        return await loop.run_in_executor(None, release.wait, 60)

    assert loop.run_until_complete(work())


def test_what_executor_work_raises_reaches_the_awaiter(loop):
    async def work():
        await loop.run_in_executor(None, int, "x")

    with pytest.raises(ValueError, match="invalid literal"):
        loop.run_until_complete(work())
