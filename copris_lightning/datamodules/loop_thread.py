"""An asyncio event loop in a background thread, called from Lightning's main thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


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
    ) -> T:
        """Run a coroutine to its end and return its result.

        Args:
            work: runs on the loop.
            every_s: how often to call ``on_wait``, in seconds.
            on_wait: called in this thread while waiting. What it raises (or a Ctrl-C that arrives
                here) cancels the coroutine, waits until it has cleaned up, and is raised.
        """
        tasks: list[asyncio.Task[T]] = []
        finished = threading.Event()

        def launch() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: finished.set())

        self._loop.call_soon_threadsafe(launch)
        try:
            while not finished.wait(every_s):
                self._check_alive()
                on_wait()
        except BaseException:
            if self._thread.is_alive():
                self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())
                while not finished.wait(every_s):
                    self._check_alive()
            if not finished.is_set():
                raise
            if not tasks[0].cancelled():
                tasks[0].exception()  # seen; the interruption is what gets raised
            raise
        return tasks[0].result()

    def close(self) -> None:
        """Stop the loop and end the thread. May be called twice."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
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
