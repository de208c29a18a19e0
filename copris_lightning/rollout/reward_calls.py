"""A call of a reward, from the loop that waits for it, and its outcome on the way back there."""

from __future__ import annotations

import contextlib
import math
import threading
from asyncio import AbstractEventLoop
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from copris_lightning.errors import RewardError


@dataclass(slots=True, eq=False)
class Call:
    """One call: its arguments pickled, and who waits for it, on which loop.

    A worker that has not answered it by its deadline is ended; on the clock of ``time.monotonic``,
    and infinite until a worker has begun it.
    """

    number: int
    prompt_id: str
    pair: bytes
    future: Future[Any]
    loop: AbstractEventLoop
    deadline: float = math.inf

    def failed(self, text: str, cause: BaseException | None) -> RewardError:
        """The error that names its prompt."""
        error = RewardError(f"the reward of prompt {self.prompt_id!r} {text}")
        error.__cause__ = cause
        return error


class Outcomes:
    """Brings outcomes to the loops that wait for them, many at a time.

    To wake a loop takes Python's lock from it, which may take 5 ms when it is busy.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready: dict[AbstractEventLoop, list[tuple[Future[Any], object]]] = {}
        self._untold: list[AbstractEventLoop] = []

    def add(self, call: Call, outcome: object) -> None:
        """Keep a result, or an exception, for the next :meth:`deliver`."""
        with self._lock:
            if call.loop not in self._ready:
                self._ready[call.loop] = []
                self._untold.append(call.loop)
            self._ready[call.loop].append((call.future, outcome))

    def deliver(self) -> None:
        """Have loops hand out what is kept for them."""
        with self._lock:
            loops, self._untold = self._untold, []
        for loop in loops:
            with contextlib.suppress(RuntimeError):  # it is closed: nobody waits
                loop.call_soon_threadsafe(self._hand_out, loop)

    def _hand_out(self, loop: AbstractEventLoop) -> None:
        with self._lock:
            ready = self._ready.pop(loop, [])
        for future, outcome in ready:
            finish(future, outcome)


def finish(future: Future[Any], outcome: object) -> None:
    """Give a future its outcome, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
