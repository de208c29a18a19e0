"""An asyncio event loop in a background thread, called from Lightning's main thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from copris_lightning.errors import RolloutError

T = TypeVar("T")

CLEANUP_S = 60.0
"""How long the thread, or a call that was cancelled, may take to clean up, in seconds."""

_log = logging.getLogger(__name__)


class StuckError(RolloutError):
    """The rollout thread does not get to the end of something that takes no time."""


class LoopThread:
    """Runs coroutines on a loop of its own while the main thread waits or trains.

    Args:
        new_event_loop: makes the loop (an engine knows which kind it lives on).
    """

    def __init__(self, new_event_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._run, name="copris-rollout", daemon=True)
        self._thread.start()

    def call(
        self,
        work: Coroutine[Any, Any, T],
        *,
        every_s: float = 0.2,
        on_wait: Callable[[], None] = lambda: None,
        timeout_s: float | None = None,
    ) -> T:
        """Run a coroutine to its end and return its result.

        Args:
            work: runs on the loop.
            every_s: how often to call ``on_wait``, in seconds.
            on_wait: called in this thread while waiting. What it raises (or a Ctrl-C that arrives
                here) cancels the coroutine, waits until it has cleaned up (but not for ever), and
                is raised.
            timeout_s: how long it may take, in seconds of this machine's clock.

        Raises:
            StuckError: it took longer; it was cancelled.
        """
        tasks: list[asyncio.Task[T]] = []
        finished = threading.Event()

        def launch() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: finished.set())

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            self._loop.call_soon_threadsafe(launch)  # a Ctrl-C may arrive when that is done
            while not finished.wait(every_s):
                self._check_alive()
                on_wait()
                if deadline is not None and time.monotonic() > deadline:
                    raise StuckError(
                        f"the rollout thread was not done with {_name(work)} after {timeout_s:g} s"
                    )
        except BaseException as interruption:
            self._cancel(tasks, finished, every_s)
            if not finished.is_set():
                interruption.add_note(
                    f"{_name(work)} was cancelled and has not ended after {CLEANUP_S:g} s"
                )
            elif tasks and not tasks[0].cancelled():
                tasks[0].exception()  # seen; the interruption is what gets raised
            raise
        return tasks[0].result()

    def _cancel(
        self, tasks: list[asyncio.Task[T]], finished: threading.Event, every_s: float
    ) -> None:
        """Cancel a task and wait for its cleanup, as long as there is hope for one."""
        deadline = time.monotonic() + CLEANUP_S

        def cancel() -> None:
            if not tasks:  # it was not launched
                finished.set()
            for task in tasks:
                task.cancel()

        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(cancel)
        while self._thread.is_alive() and time.monotonic() < deadline:
            if finished.wait(every_s):
                return

    def close(self) -> None:
        """Stop the loop and end the thread. May be called twice.

        A thread that does not end within :data:`CLEANUP_S` is left behind: it is a daemon.
        """
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLEANUP_S)
        if self._thread.is_alive():
            _log.error(f"the rollout thread has not ended after {CLEANUP_S:g} s; leaving it")
        else:
            self._loop.close()

    def _check_alive(self) -> None:
        # asyncio lets a SystemExit or KeyboardInterrupt raised in a task end the loop itself.
        if not self._thread.is_alive():
            raise RuntimeError("the rollout thread ended; its error is printed above")

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        leftovers = asyncio.all_tasks(self._loop)
        for task in leftovers:
            task.cancel()
        if leftovers:
            self._loop.run_until_complete(asyncio.wait(leftovers))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())


def _name(work: Coroutine[Any, Any, Any]) -> str:
    """Which function made a coroutine."""
    return str(getattr(work, "__qualname__", work))
