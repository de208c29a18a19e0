"""One worker process of a reward, seen from the trainer: its start, deadlines and death.

Two threads belong to it: one sends to it (a worker that hangs does not read), one waits for its
answers, for its death and for the deadlines of what it is doing. So no wait for it is without end.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import Any, Protocol

from copris_lightning.errors import RewardError
from copris_lightning.rollout.process_group import ProcessGroup
from copris_lightning.rollout.reward_process import (
    BLOCKING,
    CLOSE,
    READY,
    Failure,
    too_late,
)
from copris_lightning.rollout.spawning import preparation

_GRACE_S = 5.0
"""An ``async`` call is ended inside its worker; so much later, the worker is ended."""
_LOOK_S = 1.0
"""How often a busy process is looked at: what it leaves behind may hold its connection open."""
_END_S = 2.0
"""How long an idle worker may take to end by itself."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker does.

    Attributes:
        reward: pickled; every worker gets it once.
        name: of the reward, for messages.
        is_async: whether the reward is awaited.
        timeout_s: limit on one call, in seconds from when it is sent to a worker.
        start_s: limit on a worker's start, in seconds.
    """

    reward: bytes
    name: str
    is_async: bool
    timeout_s: float
    start_s: float


@dataclass(slots=True, eq=False)
class Call:
    """One call of the reward: its arguments pickled, where the result goes, until when."""

    prompt_id: str
    pair: bytes
    future: Future[Any]
    deadline: float = math.inf


class Owner(Protocol):
    """Whom a worker tells what happens; its lock is held meanwhile."""

    work: Work
    lock: threading.RLock

    def dispatch(self) -> None:
        """A worker has room for a call."""
        ...

    def on_ready(self) -> None:
        """A worker has the reward."""
        ...

    def on_end(self, worker: Worker) -> None:
        """A worker that was ready has ended."""
        ...

    def on_fault(self, text: str, cause: BaseException | None) -> None:
        """A worker could not start."""
        ...


class Worker:
    """One process, from its start to its end."""

    def __init__(self, owner: Owner) -> None:
        self.out: dict[int, Call] = {}
        """The calls that it has, by number; the owner's lock guards them."""
        self.is_ready = False
        self._owner = owner
        self._work = owner.work
        self._numbers = count()
        self._outbox: SimpleQueue[Any] = SimpleQueue()
        self._woken, self._wake = Pipe(duplex=False)
        self._is_woken = False
        self._closing = self._gently = False
        self._start_by = math.inf
        self._asked: list[int] = []
        self._answer_by = math.inf
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the process, unless that was done before."""
        if self._thread is None:
            self._start_by = time.monotonic() + self._work.start_s
            self._thread = threading.Thread(target=self._attend, name="copris-reward", daemon=True)
            self._thread.start()

    def take(self, call: Call) -> None:
        """Have the worker do a call; it is sent once the worker is ready."""
        number = next(self._numbers)
        self.out[number] = call
        self.start()
        if self.is_ready:
            self._outbox.put(number)
        call.future.add_done_callback(lambda future: self._let_go(number, future))

    def close(self) -> None:
        """Have the worker ended: an idle one gently, a busy one at once. See :meth:`join`."""
        self._gently = self.is_ready and not self.out
        self._closing = True
        calls, self.out = self.out, {}
        for call in calls.values():
            call.future.cancel()
        self._notify()

    def join(self) -> None:
        """Wait until the process is gone."""
        if self._thread is not None:
            self._thread.join()
        for connection in (self._woken, self._wake):
            connection.close()

    def _let_go(self, number: int, future: Future[Any]) -> None:
        """Nobody waits for a call any more. An ``async`` one is cancelled in the worker; a plain
        one that has begun goes on to its end or limit, for a new worker would cost more."""
        with self._owner.lock:
            call = self.out.get(number)
            if call is None or not future.cancelled():
                return
            if self._work.is_async:
                self._outbox.put((number, None))
            elif call.deadline < math.inf:
                return
            del self.out[number]
            self._owner.dispatch()

    def _notify(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._wake.send_bytes(b"\0")

    # -- the two threads -------------------------------------------------------------------

    def _attend(self) -> None:
        """Start the process, wait for what it says, and end it."""
        work = self._work
        try:
            first = (preparation(work.reward), work.reward, work.is_async, work.timeout_s)
            process = ProcessGroup("copris_lightning.rollout.reward_process")
        except OSError as error:
            with self._owner.lock:
                self._owner.on_fault(f"a worker process cannot be started: {error}", error)
            return
        sender = threading.Thread(target=self._send, args=(process.connection, first), daemon=True)
        sender.start()
        try:
            while self._listen(process):
                pass
            if self._gently:
                self._outbox.put((CLOSE, None))
                process.wait(_END_S)
        finally:
            self._outbox.put(None)
            process.kill()
            sender.join()
            process.close()

    def _send(self, connection: Connection, first: tuple[Any, ...]) -> None:
        work = self._work
        with contextlib.suppress(OSError):  # the worker has ended, as the other thread finds out
            connection.send(first)
            while (item := self._outbox.get()) is not None:
                if isinstance(item, int):
                    with self._owner.lock:
                        call = self.out.get(item)
                        if call is None:
                            continue
                        grace = min(_GRACE_S, work.timeout_s) if work.is_async else 0.0
                        call.deadline = time.monotonic() + work.timeout_s + grace
                        self._notify()
                    item = (item, call.pair)
                connection.send(item)

    def _listen(self, process: ProcessGroup) -> bool:
        """Wait for one thing and act on it; false when the worker is to end."""
        with self._owner.lock:
            if self._closing:
                return False
            deadline = self._deadline()
            look_by = math.inf if self.is_ready and not self.out else time.monotonic() + _LOOK_S
        by = min(deadline, look_by)
        came = wait(
            [process.connection, self._woken],
            None if by == math.inf else max(0.0, by - time.monotonic()),
        )
        if self._woken in came:
            with self._owner.lock:
                self._woken.recv_bytes()
                self._is_woken = False
        if process.connection in came:
            try:
                number, answer = process.connection.recv()
            except (EOFError, OSError):
                self._on_death(process)
                return False
            with self._owner.lock:
                return self._on_answer(number, answer)
        if not came and process.has_ended():
            self._on_death(process)
            return False
        with self._owner.lock:
            return time.monotonic() < self._deadline() or self._on_deadline()

    # -- what came; the lock is held, and false ends the worker ------------------------------

    def _on_answer(self, number: int, answer: Any) -> bool:
        if number == READY and isinstance(answer, Failure):
            self._owner.on_fault(
                f"a worker process cannot load {self._work.name}: {answer.text}",
                answer.exception(),
            )
            return False
        if number == READY:
            self.is_ready = True
            for waiting in self.out:
                self._outbox.put(waiting)
            self._owner.on_ready()
        elif number == BLOCKING:
            return self._on_explanation(answer)
        elif number in self.out:  # else nobody waits for it any more
            call = self.out.pop(number)
            if isinstance(answer, Failure):
                finish(call.future, error=_error(call, answer.text, answer.exception()))
            else:
                finish(call.future, answer)
            self._owner.dispatch()
        return True

    def _deadline(self) -> float:
        if not self.is_ready:
            return self._start_by
        if self._asked:
            return self._answer_by
        return min((call.deadline for call in self.out.values()), default=math.inf)

    def _on_deadline(self) -> bool:
        if not self.is_ready:
            self._owner.on_fault(
                f"a worker process was not ready after {self._work.start_s:g} s: does the module "
                f"of {self._work.name} wait for something when it is imported?",
                None,
            )
            return False
        if self._asked:
            return self._on_explanation(None)
        late = [n for n, call in self.out.items() if call.deadline <= time.monotonic()]
        if self._work.is_async:  # it could not end the call itself: which one holds up the others?
            self._asked = late
            self._answer_by = time.monotonic() + _LOOK_S
            self._outbox.put((BLOCKING, None))
            return True
        self._fail(late, too_late(self._work.timeout_s).text)
        return False

    def _on_explanation(self, blocking: int | None) -> bool:
        """The worker said, or could not say, which call holds up its event loop."""
        late = [number for number in self._asked if number in self.out]
        self._asked = []
        text = too_late(self._work.timeout_s).text
        if blocking in self.out:
            self._fail(
                [blocking],
                f"{text}, or made others do so: it holds up the event loop (as time.sleep does; "
                "use `await asyncio.to_thread(...)`)",
            )
        elif late:
            self._fail(late, f"{text}, and goes on when it is cancelled")
        else:
            return True  # what was late has answered meanwhile
        return False

    def _fail(self, blamed: list[int], text: str) -> None:
        """Fail some calls by their names, and those that were in the same worker for them."""
        first = self.out[blamed[0]]
        for number in blamed:
            call = self.out.pop(number)
            finish(call.future, error=_error(call, text, TimeoutError(text)))
        self._fail_all(f"lost its worker process: the reward of prompt {first.prompt_id!r} {text}")

    def _fail_all(self, text: str) -> None:
        calls, self.out = [*self.out.values()], {}
        for call in calls:
            finish(call.future, error=_error(call, text, None))
        self._owner.on_end(self)

    def _on_death(self, process: ProcessGroup) -> None:
        """The process has ended by itself. Takes the lock."""
        process.wait(_LOOK_S)
        process.kill()
        how = process.how_it_ended()
        with self._owner.lock:
            if self._closing:
                return
            if self.is_ready:
                others = f"; {len(self.out)} calls were in it" if len(self.out) > 1 else ""
                self._fail_all(f"ended its worker process ({how}{others})")
            else:
                self._owner.on_fault(
                    f"a worker process ended ({how}) while it loaded {self._work.name}; what it "
                    "printed above says why",
                    None,
                )


def finish(future: Future[Any], value: Any = None, error: BaseException | None = None) -> None:
    """Give a future its outcome, unless it was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _error(call: Call, text: str, cause: BaseException | None) -> RewardError:
    error = RewardError(f"the reward of prompt {call.prompt_id!r} {text}")
    error.__cause__ = cause
    return error
