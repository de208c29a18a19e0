"""One worker process of a reward, seen from the trainer: its calls, its deadlines, its death.

Nothing here waits: the :class:`Attendant` reads what the process says, and looks at the clock.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any, Protocol

from copris_lightning.rollout.process_group import ProcessGroup
from copris_lightning.rollout.reward_calls import Call
from copris_lightning.rollout.reward_process import (
    BLOCKING,
    CLOSE,
    GIVEN_BACK,
    READY,
    Failure,
    too_late,
)
from copris_lightning.rollout.spawning import preparation

_AHEAD = 64
"""Plain calls that a worker has at a time. It begins the next one by itself: the trainer, whose
threads wait for Python's lock, may take tens of milliseconds to hear of an answer. One that gives
calls back gets fewer, for a while."""
_GRACE_S = 5.0
"""An ``async`` call is ended inside its worker; so much later, the worker is ended."""
_ANSWER_S = 1.0
"""How long a worker may take to say which call holds up its event loop."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker does.

    Attributes:
        reward: pickled; every worker gets it once.
        name: of the reward, for messages.
        is_async: whether the reward is awaited.
        timeout_s: limit on one call, in seconds from when a worker begins it.
        start_s: limit on a worker's start, in seconds.
    """

    reward: bytes
    name: str
    is_async: bool
    timeout_s: float
    start_s: float


class Owner(Protocol):
    """Whom a worker tells what happens. Its lock is held whenever a worker is called."""

    work: Work

    def finish(self, call: Call, outcome: object) -> None:
        """A call has a result, or an exception."""
        ...

    def give_back(self, calls: list[Call]) -> None:
        """Some calls were not begun, and want another worker."""
        ...

    def on_fault(self, text: str, cause: BaseException | None) -> None:
        """A worker could not start."""
        ...


class Worker:
    """One process, from its start to its end.

    Args:
        owner: is told what happens.
        process: just started.

    Attributes:
        out: the calls that it has, in the order in which it begins them.
        is_ready: whether it has the reward.
        is_over: whether its process has ended, or is to be ended.
    """

    def __init__(self, owner: Owner, process: ProcessGroup) -> None:
        work = owner.work
        self.out: dict[int, Call] = {}
        self.process = process
        self.is_ready = self.is_over = False
        self._owner = owner
        self._is_deaf = False
        self._room = _AHEAD
        self._asked: list[int] = []
        self._answer_by = time.monotonic() + work.start_s
        self._tell(READY, (preparation(work.reward), work.reward, work.is_async, work.timeout_s))

    @property
    def is_busy(self) -> bool:
        """Whether something is expected of it."""
        return bool(self.out) or not self.is_ready

    @property
    def is_behind(self) -> bool:
        """Whether something is still to be sent to it."""
        return self.process.channel.is_behind

    @property
    def has_room(self) -> bool:
        """Whether it can take a call."""
        if self.is_over or self._is_deaf or not self.is_ready:
            return False
        return self._owner.work.is_async or len(self.out) < self._room

    def take(self, call: Call) -> bool:
        """Have the worker do a call; false if it was found dead."""
        if not self._tell(call.number, call.pair):
            self._is_deaf = True
            return False
        self.out[call.number] = call
        if self._owner.work.is_async:
            limit = self._owner.work.timeout_s
            call.deadline = time.monotonic() + limit + min(_GRACE_S, limit)
        else:
            self._time_first()
        return True

    def let_go(self, call: Call) -> None:
        """Nobody waits for a call any more. An ``async`` one is cancelled in the worker; a plain
        one that has begun goes on to its end or limit, for a new worker would cost more."""
        if self._owner.work.is_async:
            del self.out[call.number]
        self._tell(call.number, None)

    def flush(self) -> None:
        """Send what could not be sent before."""
        with contextlib.suppress(OSError):  # it is gone, as the attendant finds out
            self.process.channel.flush()

    def dismiss(self) -> bool:
        """Ask an idle worker to end; false where one must be killed."""
        return not self.is_busy and self._tell(CLOSE, None)

    def _tell(self, number: int, content: object) -> bool:
        with contextlib.suppress(OSError):  # it is gone, as the attendant finds out
            self.process.channel.send((number, content))
            return True
        return False

    # -- what the process says -------------------------------------------------------------

    def hear(self, messages: list[tuple[int, Any]]) -> None:
        """Act on what the process said."""
        unbegun = []
        for number, answer in messages:
            if self.is_over:
                return
            if number == READY:
                self._on_ready(answer)
            elif number == BLOCKING:
                self._on_explanation(answer)
            elif (call := self.out.pop(number, None)) is None:
                pass  # nobody waits for it any more
            elif answer != GIVEN_BACK:
                self._room = min(2 * self._room, _AHEAD)
                failure = isinstance(answer, Failure)
                self._owner.finish(
                    call, call.failed(answer.text, answer.exception()) if failure else answer
                )
            elif not call.future.cancelled():
                self._room = 1  # until it has answered, and little for a while
                unbegun.append(call)
        self._time_first()
        self._owner.give_back(unbegun)

    def _on_ready(self, failure: Failure | None) -> None:
        if failure is None:
            self.is_ready = True
            self._answer_by = math.inf
            return
        text = f"a worker process cannot load {self._owner.work.name}: {failure.text}"
        self.is_over = True
        self._owner.on_fault(text, failure.exception())

    def _time_first(self) -> None:
        """A plain call has begun when the one before it has ended."""
        call = next(iter(self.out.values()), None)
        if call is not None and call.deadline == math.inf:
            call.deadline = time.monotonic() + self._owner.work.timeout_s

    # -- what it does not say --------------------------------------------------------------

    @property
    def due(self) -> float:
        """When it must have said something, on the clock of ``time.monotonic``."""
        if self._answer_by < math.inf:
            return self._answer_by
        first = next(iter(self.out.values()), None)
        return math.inf if first is None else first.deadline

    def on_due(self) -> None:
        """It has not."""
        work = self._owner.work
        if not self.is_ready:
            self.is_over = True
            self._owner.on_fault(
                f"a worker process was not ready after {work.start_s:g} s: does the module "
                f"of {work.name} wait for something when it is imported?",
                None,
            )
        elif self._answer_by < math.inf:
            self._on_explanation(None)
        else:
            late = [n for n, call in self.out.items() if call.deadline <= time.monotonic()]
            if work.is_async:  # it could not end the call: which one holds up the others?
                self._asked = late
                self._answer_by = time.monotonic() + _ANSWER_S
                self._tell(BLOCKING, None)
            else:
                self._fail(late, too_late(work.timeout_s).text)

    def _on_explanation(self, blocking: int | None) -> None:
        """The worker said, or could not say, which call holds up its event loop."""
        late = [number for number in self._asked if number in self.out]
        self._asked, self._answer_by = [], math.inf
        text = too_late(self._owner.work.timeout_s).text
        if blocking in self.out:
            self._fail(
                [blocking],
                f"{text}, or made others do so: it holds up the event loop (as time.sleep does; "
                "use `await asyncio.to_thread(...)`)",
            )
        elif late:
            self._fail(late, f"{text}, and goes on when it is cancelled")

    def on_death(self, how: str) -> None:
        """The process has ended by itself."""
        work = self._owner.work
        if not self.is_ready:
            self.is_over = True
            self._owner.on_fault(
                f"a worker process ended ({how}) while it loaded {work.name}; what it printed "
                "above says why",
                None,
            )
            return
        others = (
            f"; {len(self.out)} calls were in it" if work.is_async and len(self.out) > 1 else ""
        )
        text = f"ended its worker process ({how}{others})"
        if self.out and not work.is_async:
            call = self.out.pop(next(iter(self.out)))
            self._owner.finish(call, call.failed(text, None))
        self._end(text)

    def _fail(self, blamed: list[int], text: str) -> None:
        """End the worker for what some calls did, by their names."""
        culprit = self.out[blamed[0]].prompt_id
        for number in blamed:
            call = self.out.pop(number)
            self._owner.finish(call, call.failed(text, TimeoutError(text)))
        self._end(f"lost its worker process: the reward of prompt {culprit!r} {text}")

    def _end(self, text: str) -> None:
        """The calls that are left are lost, unless they were not begun."""
        self.is_over = True
        calls, self.out = [*self.out.values()], {}
        if not self._owner.work.is_async:
            self._owner.give_back(calls)
            return
        for call in calls:
            self._owner.finish(call, call.failed(text, None))
