"""An event loop on virtual time: the same scheduler runs on it, and each run of it is the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next deadline when nothing else is left to do.

    Calls from other threads still arrive: with no timer running the loop waits for them in real
    time. The clock stands still while work for an executor (a reward's processes) is out, and what
    comes back is held until nothing else is left to do and all of it is back; then it is handed
    over in the order in which it was sent. So neither how long a call took nor how many workers
    there are can be told from what happens on the loop, and a run is the same each time.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._out: list[tuple[asyncio.Future[Any], asyncio.Future[Any]]] = []
        super().__init__(_JumpingSelector(self._jump, self._hand_over))

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

    def _jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    """Instead of waiting for a timer, moves the clock to it.

    Args:
        jump: moves the clock, by seconds.
        hand_over: called when nothing is left to do. True if there is now, false if something will
            come in real time.
    """

    def __init__(self, jump: Callable[[float], None], hand_over: Callable[[], bool | None]) -> None:
        super().__init__()
        self._jump = jump
        self._hand_over = hand_over

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout == 0:
            return super().select(0)
        ready = self._hand_over()
        if ready:
            return super().select(0)
        if timeout is None or ready is False:
            return super().select(None)
        events = super().select(0)
        if not events:
            self._jump(timeout)
        return events
