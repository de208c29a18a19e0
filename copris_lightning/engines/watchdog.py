"""What this package waits for in other processes and threads, what ends each wait, and the watch.

A process that is waited for can die, and it can live and do nothing. So every wait has both a sign
of death and a deadline, or a reason why it needs only one. ``D.x`` is a field of
:class:`Deadlines`; the main thread's own waits are interrupted by Ctrl-C and SIGTERM besides.

==========================  ======================================  ==========================
wait, and where             ended by the other's death              ended by a deadline
==========================  ======================================  ==========================
**vLLM in this run** (vllm, vllm_processes)
boot                        vLLM's start watches its processes,     D.boot_s, then killed
                            and its cores are looked at
its last words, once dead   --                                      5 s
generate, score             vLLM ends the streams, or else          D.stall_s, then killed (not
                            ``VLLMProcesses._end_streams``          while held with requests)
load weights, add_lora,     :meth:`Watchdog.guard`                  D.sync_s
report what arrived, drop
prefixes, sleep, wake,
explain a mismatch
weight transfer (its watch, :meth:`Watchdog.guard`                  D.sync_s
init, start, update,
finish, report)
the transfer's own GPU      the collective library's                the collective library's
copies (ipc, nccl)
shutdown                    --                                      20 s, then killed
**vLLM in a process of its own** (apart_link), which waits for vLLM as above
whatever it is asked        the connection breaks                   silent for SILENT_S, then killed
close                       the connection breaks                   CLOSE_S, then killed
its end                     --                                      5 s, then killed
**servers** (server_client, server_http)
questions, resume           the connection breaks                   connect_timeout_s
generate, score, pause      the connection breaks                   stall_timeout_s
load weights, explain       the connection breaks (a server whose   sync_timeout_s
                            engine died ends within seconds)
**rewards** (reward_worker, session)
start of a worker           its pipe breaks                         start_s of RewardScorer
the engine's boot, for it   --                                      30 s, then both go on
a call in a worker          its pipe breaks                         reward_timeout_s (if async,
                                                                    at most 6 s more)
end of a worker             --                                      idle: 2 s, then killed;
                                                                    busy: killed at once
**the rollout thread** (loop_thread, session)
call                        looked at five times a second           whatever the work waits for
call that is not to be      looked at five times a second           BRIEF_S of session
interrupted
a cancelled call's cleanup  looked at five times a second           CLEANUP_S of loop_thread
a hold or release in it     --                                      5 s, then cancelled
(shared_engine)
close, join                 --                                      CLEANUP_S of loop_thread
**other ranks** (exchange, runs, module)
scatter, broadcast, gather  gloo: the connection breaks             30 days: rollouts take long
what the strategy reduces   the collective library's                the strategy's timeout
or broadcasts
**an engine's processes, for their owner** (owner)
owner, core                 looked at once a second                 --
==========================  ======================================  ==========================
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from copris_lightning.errors import ConfigurationError, EngineError

T = TypeVar("T")

_REAP_TIMES = 100
"""How often to look for an ended process's exit code, every 20 ms."""

_CANCEL_S = 5.0
"""How long a call that was given up may take to end, in seconds."""


@dataclass(frozen=True)
class Deadlines:
    """How long an engine may take while its processes live, in seconds.

    Generous: they are there for an engine that hangs. One that dies is noticed at once.

    Attributes:
        boot_s: to boot, model loading and compilation included.
        stall_s: for one new token while it has work.
        sync_s: to load weights, and for each other call of its own.

    Raises:
        ConfigurationError: one that is not above 0.
    """

    boot_s: float = 1800.0
    stall_s: float = 600.0
    sync_s: float = 600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigurationError(f"{name}={value} must be above 0")


class WatchedProcess(Protocol):
    """What is looked at of a process; ``multiprocessing``'s have it."""

    name: str

    @property
    def sentinel(self) -> int:
        """A file descriptor that can be read from once the process has ended."""
        ...

    @property
    def exitcode(self) -> int | None:
        """As of ``multiprocessing.Process``: minus the signal that killed it."""
        ...


class Watchdog:
    """Ends the wait for an answer that cannot come any more.

    Made, used and closed on one event loop.

    Args:
        processes: whoever answers; the death of one is the death of all.
        cause: says why they died, as far as anything but exit codes tells; may be empty.
    """

    def __init__(
        self, processes: Iterable[WatchedProcess], cause: Callable[[], str] = lambda: ""
    ) -> None:
        self._processes = list(processes)
        self._cause = cause
        self._loop = asyncio.get_running_loop()
        self._death: asyncio.Future[None] = self._loop.create_future()
        # Copies: who made the processes may close theirs at any time.
        self._sentinels = [os.dup(process.sentinel) for process in self._processes]
        for sentinel in self._sentinels:
            self._loop.add_reader(sentinel, self._bury)

    async def guard(self, work: Awaitable[T], doing: str, deadline: tuple[str, float]) -> T:
        """The result of ``work``, unless a process dies or the deadline passes before.

        Args:
            work: waits for the processes.
            doing: what they were asked to do, for the error: "load the weights".
            deadline: the setting's name and its seconds.

        Raises:
            EngineError: names what died and of what, or the setting.
        """
        task = asyncio.ensure_future(work)
        either: set[asyncio.Future[Any]] = {task, self._death}
        try:
            await asyncio.wait(either, timeout=deadline[1], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._death.done():
                await self.wait_for_death(0)
                raise EngineError(f"{self.verdict()} while it was to {doing}")
            raise EngineError(
                f"the engine did not {doing} within {deadline[0]}={deadline[1]:g} s, though its "
                "processes live; raise it if the engine needs longer"
            )
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_CANCEL_S)
            if task.done() and not task.cancelled():
                task.exception()  # seen; something else is raised

    def on_death(self, callback: Callable[[], None]) -> None:
        """Have a function called, on the loop, when a process has ended."""
        self._death.add_done_callback(lambda _: callback())

    async def wait_for_death(self, within_s: float) -> None:
        """Return when a process has ended and its exit code is there, or after ``within_s``."""
        await asyncio.wait({self._death}, timeout=within_s)
        # The descriptor closes a moment before there is an exit code, and another thread may be
        # reading that just now.
        for _ in range(_REAP_TIMES if self._death.done() else 0):
            if any(process.exitcode is not None for process in self._processes):
                return
            await asyncio.sleep(0.02)

    def verdict(self) -> str:
        """What died and of what, as the beginning of a sentence."""
        return obituary(self._processes, self._cause())

    def close(self) -> None:
        """Stop watching. May be called twice."""
        for sentinel in self._sentinels:
            self._loop.remove_reader(sentinel)
            os.close(sentinel)
        self._sentinels = []

    def _bury(self) -> None:
        self.close()
        if not self._death.done():
            self._death.set_result(None)


class SilenceWatch:
    """Notices that somebody has work and sends nothing. Used on one event loop.

    Args:
        limit_s: how long that may last, in seconds.
        too_long: called when it has.
    """

    def __init__(self, limit_s: float, too_long: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._too_long = too_long
        self._working = 0
        self._heard = 0.0
        self._rests = False
        self._next_look: asyncio.TimerHandle | None = None

    def rest(self, rests: bool) -> None:
        """It was told to send nothing, or no longer."""
        self._rests = rests
        self.heard()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around each piece of work."""
        self._working += 1
        if self._working == 1:
            self.heard()
            self._look()
        try:
            yield
        finally:
            self._working -= 1
            if not self._working and self._next_look is not None:
                self._next_look.cancel()
                self._next_look = None

    def heard(self) -> None:
        """Something was sent."""
        self._heard = asyncio.get_running_loop().time()

    def _look(self) -> None:
        """Look now, and again when it may have been silent for too long."""
        loop = asyncio.get_running_loop()
        left = self._limit_s if self._rests else self._heard + self._limit_s - loop.time()
        if left > 0:
            self._next_look = loop.call_later(left, self._look)
        else:
            self._next_look = None
            self._too_long()


def obituary(processes: Iterable[WatchedProcess], cause: str) -> str:
    """What died and of what, as the beginning of a sentence.

    Args:
        processes: some of which have ended.
        cause: what else is known; may be empty.
    """
    ended = "; ".join(
        f"{process.name} {exit_reason(process.exitcode)}"
        for process in processes
        if process.exitcode is not None
    )
    return "the engine died" + "".join(f": {reason}" for reason in (cause, ended) if reason)


def exit_reason(exitcode: int | None) -> str:
    """How a process ended, in words."""
    if exitcode is None:
        return "has not ended"
    if exitcode < 0:
        return f"was killed by {signal.Signals(-exitcode).name}"
    if exitcode == 0:
        return "ended by itself with exit status 0, as it does when it is told to stop"
    return f"ended with exit status {exitcode}"
