"""An event loop on virtual time: the same scheduler runs on it, and each run of it is the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


_NO_TIME = 1e-6
"""Virtual seconds until nothing that takes no time is left to do."""


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next deadline when nothing else is left to do.

    Calls from other threads still arrive: with no timer running the loop waits for them in real
    time. The clock stands still while work for an executor (a reward's processes) is out, and what
    comes back is held until nothing else is left to do and all of it is back; then it is handed
    over in the order in which it was sent. So neither how long a call took nor how many workers
    there are can be told from what happens on the loop, and a run is the same each time.

    What goes on while other threads work, which take real time, would not be. So after
    :func:`stand_still` the clock moves within :func:`time_passes` only.

    Args:
        training_s: what :func:`training` takes, in virtual seconds.
    """

    def __init__(self, training_s: float = 0.0) -> None:
        self.training_s = training_s
        self.stands_still = False
        self.passing = 0
        self._now = 0.0
        self._out: list[tuple[asyncio.Future[Any], asyncio.Future[Any]]] = []
        super().__init__(_JumpingSelector(self._jump, self._hand_over, self._may_jump))

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def run_in_executor(
        self, executor: Any, func: Callable[[*Arguments], T], *args: *Arguments
    ) -> asyncio.Future[T]:
        """Have an executor call ``func``, which takes no virtual time."""
        held: asyncio.Future[T] = self.create_future()
        self._out.append((super().run_in_executor(executor, func, *args), held))
        held.add_done_callback(self._let_go)
        return held

    def _let_go(self, held: asyncio.Future[Any]) -> None:
        """Nobody waits for a call any more."""
        if held.cancelled():
            for call, _ in (pair for pair in self._out if pair[1] is held):
                call.cancel()
            self._out = [pair for pair in self._out if pair[1] is not held]

    def _hand_over(self) -> bool | None:
        """Hand over what is out if all of it is back; ``None`` if nothing is out."""
        if not self._out:
            return None
        if not all(call.done() for call, _ in self._out):
            return False
        back, self._out = self._out, []
        for call, held in back:
            if call.cancelled():
                held.cancel()
            elif (error := call.exception()) is not None:
                held.set_exception(error)
            else:
                held.set_result(call.result())
        return True

    def _may_jump(self) -> bool:
        return not self.stands_still or self.passing > 0

    def _jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock to it.

    Args:
        jump: moves the clock, by seconds.
        hand_over: called when nothing is left to do. True if there is now, false if something will
            come in real time.
        may_jump: whether the clock may be moved.
    """

    def __init__(
        self,
        jump: Callable[[float], None],
        hand_over: Callable[[], bool | None],
        may_jump: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._may_jump = may_jump
        self._jump = jump
        self._hand_over = hand_over

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout == 0:
            return super().select(0)
        ready = self._hand_over()
        if ready:
            return super().select(0)
        if timeout is None or ready is False or not self._may_jump():
            return super().select(None)
        events = super().select(0)
        if not events:
            self._jump(timeout)
        return events


def stand_still() -> None:
    """From now on a virtual clock moves within :func:`time_passes` only; a real one does not care,
    here and below."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualClockLoop):
        loop.stands_still = True


@contextmanager
def time_passes() -> Iterator[None]:
    """Around what takes virtual time, such as the wait for a batch."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualClockLoop):
        yield
        return
    loop.passing += 1
    try:
        yield
    finally:
        loop.passing -= 1


async def all_that_takes_no_time() -> None:
    """Wait for whatever would have happened by now, had other threads taken no real time: without
    this, how far a virtual run is depends on theirs."""
    await _sleep(_NO_TIME)


async def training() -> None:
    """A batch has been trained on: let the virtual time pass that this is said to take."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualClockLoop) and loop.training_s > 0:
        await _sleep(loop.training_s)


async def _sleep(seconds: float) -> None:
    if isinstance(asyncio.get_running_loop(), VirtualClockLoop):
        with time_passes():
            await asyncio.sleep(seconds)
