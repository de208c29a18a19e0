"""The inside of a reward's worker process: calls the reward on the process' main thread.

There, ``signal.alarm`` works, as a verifier's time limit may need it. A plain reward is called, one
response at a time; an ``async`` one is awaited on a loop of the main thread, many at a time.
Nothing heavy is imported here: every worker does it again.
"""

from __future__ import annotations

import contextlib
import io
import math
import multiprocessing.spawn
import numbers
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from copris_lightning.engines.channel import Channel
from copris_lightning.rollout.spawning import SecondRun, loading
from copris_lightning.search_path import forget_own_safe_path

if TYPE_CHECKING:
    import asyncio

READY, CLOSE, BLOCKING = -1, -2, -3
"""What a message is about that is about no call: the first answer of a worker (``None``, or the
:class:`Failure` to load the reward); the request to end; and the question which call holds up the
loop (answered by its number, ``None`` if nothing does)."""

GIVEN_BACK = "given back"
"""The answer to a call that was not begun: another worker may have it."""
_PATIENCE_S = 0.1
"""A plain call that takes longer does not keep those waiting that were sent ahead."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call gave no reward.

    Attributes:
        text: goes on after "the reward of prompt 'x' ".
        cause: the pickled exception behind it, if it can be sent.
    """

    text: str
    cause: bytes | None = None

    def exception(self) -> BaseException | None:
        """The exception behind it, where its class can be imported."""
        if self.cause is None:
            return None
        try:
            error = pickle.loads(self.cause)
        except Exception as problem:  # noqa: BLE001 - a user's class may raise anything
            return RuntimeError(f"(could not be sent from the worker process: {problem!r})")
        return error if isinstance(error, BaseException) else None


def too_late(timeout_s: float) -> Failure:
    """A call past its limit."""
    return Failure(f"took longer than task.scoring.timeout_s={timeout_s}")


def as_number(value: Any) -> float:
    """What a reward returned as a float; NaN for ``None``, which says that there is no verdict.

    Numbers of every kind will do: ``bool``, ``int``, ``Fraction``, ``Decimal``, numpy's and torch's
    scalars, and arrays or tensors of one element. Text is no number, not even ``"1.0"``.

    Raises:
        Exception: it is no number; what kind depends on the value's own class.
    """
    if callable(getattr(value, "item", None)):
        value = value.item()  # one element; numpy's and torch's raise where there are more
    if value is None:
        return math.nan
    is_complex = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    kind = type(value)
    # `float` itself would also take text and bytes.
    if is_complex or not (hasattr(kind, "__float__") or hasattr(kind, "__index__")):
        raise TypeError(f"a {kind.__name__} is not a number")
    return float(value)


def run(connection_fd: int, trainer_fd: int) -> None:
    """The life of a worker: load the reward, answer calls, end with its connection or trainer.

    The first message is ``(READY, (preparation, pickled reward, is_async, timeout_s))``, each one
    after it ``(number, pickled (response, prompt))``, and each answer ``(number, reward, Failure or
    GIVEN_BACK)``. A message with ``None`` cancels an ``async`` call, or one that is not begun.

    Args:
        connection_fd: file descriptor of the connection to the trainer.
        trainer_fd: of a pipe whose other end only the trainer has.
    """
    forget_own_safe_path()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True, errors="backslashreplace")
    _leave_signals_to_the_trainer()
    threading.Thread(target=_end_with, args=(trainer_fd,), daemon=True).start()
    other_end = _OtherEnd(Channel(socket.socket(fileno=connection_fd)))
    [(begun, first)] = other_end.hear()
    if begun == CLOSE:
        return
    preparation, pickled, is_async, timeout_s = first
    try:
        with loading():
            # As in multiprocessing: path, directory and, if the reward needs it, main module.
            multiprocessing.spawn.prepare(preparation)
            reward = pickle.loads(pickled)
    except BaseException as error:  # noqa: BLE001 - a user's module may raise anything
        is_known = isinstance(error, SecondRun)
        other_end.tell(READY, Failure(str(error)) if is_known else _raised(error))
        return
    other_end.tell(READY, None)
    if is_async:
        import asyncio

        asyncio.run(_serve_async(other_end, reward, timeout_s))
    else:
        _Queue(other_end).work(reward)


class _OtherEnd:
    """The other end of the connection, for several threads."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._telling = threading.Lock()

    def tell(self, number: int, answer: object) -> None:
        with self._telling, contextlib.suppress(OSError):  # nobody waits for it any more
            self._channel.send((number, answer))

    def hear(self, within_s: float | None = None) -> list[tuple[int, Any]]:
        """What it says within some time; :data:`CLOSE` if it is gone."""
        if not select.select([self._channel], [], [], within_s)[0]:
            return []
        try:
            return self._channel.receive()
        except (EOFError, OSError):
            return [(CLOSE, None)]


class _Queue:
    """Plain calls, done one after the other. Those that wait behind a long one are given back."""

    def __init__(self, other_end: _OtherEnd) -> None:
        self._other_end = other_end
        self._waiting: SimpleQueue[tuple[int, bytes] | None] = SimpleQueue()
        self._cancelled: set[int] = set()
        self._began = math.inf

    def work(self, reward: Any) -> None:
        threading.Thread(target=self._read, name="copris-reward-calls", daemon=True).start()
        while (call := self._waiting.get()) is not None:
            number, pair = call
            self._began = time.monotonic()
            answer = GIVEN_BACK if number in self._cancelled else _outcome(reward, pair)
            self._began = math.inf
            self._other_end.tell(number, answer)

    def _read(self) -> None:
        while True:
            for number, pair in self._other_end.hear(
                None if self._waiting.empty() else _PATIENCE_S
            ):
                if number == CLOSE:
                    self._waiting.put(None)
                    return
                if pair is None:
                    self._cancelled.add(number)
                else:
                    self._waiting.put((number, pair))
            if time.monotonic() - self._began > _PATIENCE_S:
                self._give_back()

    def _give_back(self) -> None:
        with contextlib.suppress(Empty):
            while (call := self._waiting.get_nowait()) is not None:
                self._other_end.tell(call[0], GIVEN_BACK)


def _outcome(reward: Any, call: bytes) -> float | Failure:
    try:
        response, prompt = pickle.loads(call)
        value = reward(response, prompt)
    except BaseException as error:  # noqa: BLE001 - also a SystemExit is the reward's error
        return _raised(error)
    return _verdict(value)


async def _serve_async(other_end: _OtherEnd, reward: Any, timeout_s: float) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    tasks: dict[int, asyncio.Task[None]] = {}
    ended = asyncio.Event()

    async def call(number: int, pair: bytes) -> None:
        other_end.tell(number, await _awaited(reward, pair, timeout_s))

    def begin(number: int, pair: bytes | None) -> None:
        if pair is not None:
            tasks[number] = loop.create_task(call(number, pair))
            tasks[number].add_done_callback(lambda _: tasks.pop(number))
        elif number in tasks:
            tasks[number].cancel()

    def read() -> None:
        while True:
            for number, pair in other_end.hear():
                if number == CLOSE:
                    loop.call_soon_threadsafe(ended.set)
                    return
                if number == BLOCKING:
                    running = asyncio.current_task(loop)
                    blocking = [n for n, task in list(tasks.items()) if task is running]
                    other_end.tell(BLOCKING, blocking[0] if blocking else None)
                else:
                    loop.call_soon_threadsafe(begin, number, pair)

    threading.Thread(target=read, name="copris-reward-calls", daemon=True).start()
    await ended.wait()


async def _awaited(reward: Any, pair: bytes, timeout_s: float) -> float | Failure:
    import asyncio

    limit = asyncio.timeout(timeout_s)
    try:
        response, prompt = pickle.loads(pair)
        async with limit:
            value = await reward(response, prompt)
    except BaseException as error:  # noqa: BLE001 - also a SystemExit is the reward's error
        if isinstance(error, TimeoutError) and limit.expired():
            return too_late(timeout_s)
        return _raised(error)
    return _verdict(value)


def _verdict(value: Any) -> float | Failure:
    try:
        return as_number(value)
    except BaseException as error:  # noqa: BLE001 - a user's class may raise anything
        return Failure(f"returned {_shown(value)}, not a number", _pickled(error))


def _raised(error: BaseException) -> Failure:
    trace = "".join(traceback.format_exception(error))[-4000:]
    return Failure(f"raised {_shown(error)}", _pickled(error, trace))


def _pickled(error: BaseException, trace: str = "") -> bytes:
    """The exception, or where it cannot be sent (many cannot), one that shows its traceback."""
    try:
        if trace:
            error.add_note(f"in the reward's worker process:\n{trace}")
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - a user's class may raise anything
        return pickle.dumps(RuntimeError(trace or f"{type(error).__name__}"))
    return pickled


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - a user's class may raise anything
        text = f"<a {type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _leave_signals_to_the_trainer() -> None:
    """A terminal or a scheduler may signal every process of a job; the trainer ends its workers."""
    worker = os.getpid()

    def leave(number: int, frame: object) -> None:
        if os.getpid() != worker:  # a process that the reward has forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # Not SIG_IGN: programs that the reward runs would inherit it.
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)


def _end_with(trainer_fd: int) -> None:
    """A trainer that is killed tells no one, and a reward may be busy for long."""
    os.read(trainer_fd, 1)  # nothing is ever written
    os.killpg(os.getpid(), signal.SIGKILL)
