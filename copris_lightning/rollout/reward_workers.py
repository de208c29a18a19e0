"""A reward's worker processes as an asyncio executor: which of them gets which call."""

from __future__ import annotations

import math
import pickle
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from copris_lightning.errors import ConfigurationError, RewardError
from copris_lightning.rollout.reward_worker import Call, Work, Worker, finish


def begin() -> None:
    """For :meth:`RewardWorkers.submit`: start all workers; done when each has the reward."""


def score(response: str, prompt: Any) -> float:
    """For :meth:`RewardWorkers.submit`: the reward of one response, NaN for no verdict."""
    raise NotImplementedError("only a worker has the reward")


class RewardWorkers(Executor):
    """Processes that each hold one copy of a reward.

    A plain reward gets one call at a time in each process; an ``async`` one any number. When a
    worker ends in the middle of its calls, or has to be ended because one of them is too late, all
    calls that it had fail: which of them are to blame cannot always be known, and a run ends with
    the first failure. The next call gets a new worker.

    Args:
        work: what the workers do.
        workers: how many there are.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self.work = work
        self.lock = threading.RLock()
        self._capacity = math.inf if work.is_async else 1
        self._waiting: deque[Call] = deque()
        self._beginning: list[Future[Any]] = []
        self._fault: ConfigurationError | None = None
        self._closed = False
        self._workers = [Worker(self) for _ in range(workers)]

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have the workers do :func:`begin` or :func:`score`.

        What comes out, beside the result: a :class:`RewardError` that names the prompt, or a
        :class:`ConfigurationError` if workers cannot be started.
        """
        future: Future[Any] = Future()
        with self.lock:
            if self._closed:
                raise RuntimeError("the reward's workers are closed")
            if self._fault is not None:
                future.set_exception(self._fault)
            elif fn is begin:
                self._beginning.append(future)
                for worker in self._workers:
                    worker.start()
                self.on_ready()
            else:
                assert fn is score
                response, prompt = args
                self._enqueue(response, prompt, future)
        return future

    def _enqueue(self, response: str, prompt: Any, future: Future[Any]) -> None:
        try:
            pair = pickle.dumps((response, prompt))
        except Exception as error:  # noqa: BLE001 - a user's class may raise anything
            failure = RewardError(
                f"prompt {prompt.id!r} cannot be sent to the reward's worker process: {error!r}"
            )
            failure.__cause__ = error
            future.set_exception(failure)
            return
        self._waiting.append(Call(prompt.id, pair, future))
        self.dispatch()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """End the workers at once, and cancel what they were doing. May be called twice."""
        with self.lock:
            self._closed = True
            workers, self._workers = self._workers, []
            for future in [*self._beginning, *(call.future for call in self._waiting)]:
                future.cancel()
            self._waiting.clear()
            for worker in workers:
                worker.close()
        for worker in workers:
            worker.join()

    def dispatch(self) -> None:
        """Give waiting calls to the workers that have the least to do. The lock is held."""
        while self._waiting and self._workers:
            worker = min(self._workers, key=lambda w: (len(w.out), not w.is_ready))
            if len(worker.out) >= self._capacity:
                return
            call = self._waiting.popleft()
            if not call.future.cancelled():
                worker.take(call)

    # -- what a worker's threads tell, holding the lock --------------------------------------

    def on_ready(self) -> None:
        """A worker has the reward."""
        if all(worker.is_ready for worker in self._workers):
            for future in self._beginning:
                finish(future)
            self._beginning.clear()
        self.dispatch()

    def on_end(self, worker: Worker) -> None:
        """A worker has ended after it was ready: another takes its place when there is work."""
        if worker in self._workers:
            heir = Worker(self)
            self._workers[self._workers.index(worker)] = heir
            if self._beginning:
                heir.start()
            self.dispatch()

    def on_fault(self, text: str, cause: BaseException | None) -> None:
        """Workers cannot be started, and there is no use in trying again."""
        self._fault = ConfigurationError(f"task.scoring.reward: {text}")
        self._fault.__cause__ = cause
        calls, self._waiting = [*self._waiting], deque()
        for worker in self._workers:
            calls += worker.out.values()
            worker.out.clear()
        for future in [*self._beginning, *(call.future for call in calls)]:
            finish(future, error=self._fault)
        self._beginning.clear()
