"""A reward's worker processes as an asyncio executor: which of them gets which call."""

from __future__ import annotations

import math
import pickle
import threading
import time
from asyncio import get_running_loop
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import count
from typing import Any

from copris_lightning.errors import ConfigurationError, RewardError
from copris_lightning.rollout.process_group import ProcessGroup
from copris_lightning.rollout.reward_attendant import LOOK_S, Attendant
from copris_lightning.rollout.reward_calls import Call, Outcomes, finish
from copris_lightning.rollout.reward_worker import Work, Worker


def begin() -> None:
    """For :meth:`RewardWorkers.submit`: start all workers; done when each has the reward."""


def score(response: str, prompt: Any) -> float:
    """For :meth:`RewardWorkers.submit`: the reward of one response, NaN for no verdict."""
    raise NotImplementedError("only a worker has the reward")


class RewardWorkers(Executor):
    """Processes that each hold one copy of a reward.

    A plain reward does one call at a time in each process; an ``async`` one any number. When a
    worker ends in the middle of its calls, or has to be ended because one of them is too late, all
    calls that it had begun fail: which of them are to blame cannot always be known, and a run ends
    with the first failure. Calls that it had not begun, and later ones, get another worker.

    Calls are sent by the thread that brings them and answers go back many at a time: with a loop
    that is busy, each time that a thread wants Python's lock costs it up to 5 ms.

    Args:
        work: what the workers do.
        workers: how many there are.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self.work = work
        self.lock = threading.RLock()
        self.is_closed = False
        self._size = workers
        self._workers: list[Worker] = []
        self._waiting: deque[Call] = deque()
        self._beginning: list[Future[Any]] = []
        self._fault: ConfigurationError | None = None
        self._numbers = count()
        self._outcomes = Outcomes()
        self._attendant = Attendant(self)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have the workers do :func:`begin` or :func:`score`, from a running event loop.

        What comes out, beside the result: a :class:`RewardError` that names the prompt, or a
        :class:`ConfigurationError` if workers cannot be started.
        """
        future: Future[Any] = Future()
        with self.lock:
            if self.is_closed:
                raise RuntimeError("the reward's workers are closed")
            if self._fault is not None:
                future.set_exception(self._fault)
            elif fn is begin:
                self._beginning.append(future)
                self._attendant.wake()
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
        loop = get_running_loop()
        call = Call(next(self._numbers), prompt.id, pair, future, loop)
        self._waiting.append(call)
        future.add_done_callback(lambda _: self._let_go(call))
        self.dispatch()

    def _let_go(self, call: Call) -> None:
        if not call.future.cancelled():
            return
        with self.lock:
            for worker in self._workers:
                if call.number in worker.out and not self.is_closed:
                    worker.let_go(call)
            self.dispatch()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """End the workers at once, and cancel what they were doing. May be called twice."""
        with self.lock:
            self.is_closed = True
            calls = [*self._waiting, *(call for w in self._workers for call in w.out.values())]
            for future in [*self._beginning, *(call.future for call in calls)]:
                future.cancel()
            self._waiting.clear()
        self._attendant.join()

    def dispatch(self) -> None:
        """Give waiting calls to the workers that have the least to do. The lock is held."""
        # Of a burst, those who are about to be ready have their share too.
        share = math.ceil(self._load() / max(1, len(self._workers)))
        while self._waiting:
            free = [one for one in self._workers if one.has_room and len(one.out) < share]
            if not free:
                break
            call = self._waiting.popleft()
            if call.future.cancelled():
                continue
            if not min(free, key=lambda worker: len(worker.out)).take(call):
                self._waiting.appendleft(call)
        if self.missing() or any(worker.is_behind for worker in self._workers):
            self._attendant.wake()
        elif self._load():
            self._attendant.wake(time.monotonic() + min(LOOK_S, self.work.timeout_s))

    def _are_ready(self) -> bool:
        return len(self._workers) == self._size and all(one.is_ready for one in self._workers)

    def _load(self) -> int:
        return len(self._waiting) + sum(len(worker.out) for worker in self._workers)

    # -- what the attendant and the workers ask and tell, holding the lock ---------------------

    def missing(self) -> int:
        """How many workers are to be started: there are as many as there are calls, at most."""
        if self._fault is not None:
            return 0
        wanted = self._size if self._beginning else min(self._size, self._load())
        return max(0, wanted - len(self._workers))

    def add(self, process: ProcessGroup) -> Worker:
        """A worker's process is started."""
        self._workers.append(Worker(self, process))
        return self._workers[-1]

    def remove(self, worker: Worker) -> None:
        """A worker has ended: another takes its place when there is work."""
        self._workers.remove(worker)

    def finish(self, call: Call, outcome: object) -> None:
        """A call has a result, or an exception."""
        self._outcomes.add(call, outcome)

    def give_back(self, calls: list[Call]) -> None:
        """Some calls were not begun, and go first now."""
        for call in calls:
            call.deadline = math.inf
        self._waiting.extendleft(reversed(calls))

    def on_fault(self, text: str, cause: BaseException | None) -> None:
        """Workers cannot be started, and there is no use in trying again."""
        self._fault = ConfigurationError(f"task.scoring.reward: {text}")
        self._fault.__cause__ = cause
        for future in self._beginning:
            finish(future, self._fault)
        self._beginning.clear()
        calls, self._waiting = [*self._waiting], deque()
        for worker in self._workers:
            calls += worker.out.values()
            worker.out.clear()
        for call in calls:
            self.finish(call, self._fault)

    def on_heard(self) -> None:
        """Some workers may be ready or have room, and there may be outcomes. Takes the lock."""
        with self.lock:
            if self._beginning and self._are_ready():
                for future in self._beginning:
                    finish(future, None)
                self._beginning.clear()
            self.dispatch()
        self._outcomes.deliver()
