"""The thread of the trainer that looks after a reward's worker processes.

It starts them, hears what they say, shows what they print, looks at the clock for them, and ends
them. No wait for one of them is without end, and none holds up the others' calls for long.
"""

from __future__ import annotations

import math
import selectors
import socket
import threading
import time
from typing import Protocol

from copris_lightning.rollout.printed import Console, Printed
from copris_lightning.rollout.process_group import ProcessGroup
from copris_lightning.rollout.reward_worker import Work, Worker

LOOK_S = 1.0
"""How often a busy process is looked at: what it leaves behind may hold its connection open."""
_END_S = 2.0
"""How long idle workers may take to end by themselves."""
_NOW = -math.inf


class Pool(Protocol):
    """Whose workers they are."""

    work: Work
    lock: threading.RLock
    is_closed: bool

    def missing(self) -> int:
        """How many workers are to be started. The lock is held."""
        ...

    def add(self, process: ProcessGroup) -> Worker:
        """A worker's process is started. The lock is held."""
        ...

    def remove(self, worker: Worker) -> None:
        """A worker has ended. The lock is held."""
        ...

    def on_fault(self, text: str, cause: BaseException | None) -> None:
        """Workers cannot be started. The lock is held."""
        ...

    def on_heard(self) -> None:
        """Some workers may be ready or have room, and there may be outcomes."""
        ...


class Attendant:
    """One thread for all processes of a pool, at work until the pool is closed.

    Args:
        pool: is told of everything.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._console = Console(pool.work.name)
        self._sleeps_until = _NOW
        self._last_event = self._next_look = _NOW
        self._thread = threading.Thread(target=self._run, name="copris-rewards", daemon=True)
        self._thread.start()

    def wake(self, by: float = _NOW) -> None:
        """Have it look at everything at some time at the latest. The pool's lock is held."""
        if self._sleeps_until > by:
            self._sleeps_until = _NOW
            self._waker.send(b"\0")

    def join(self) -> None:
        """Wait until it has ended the processes of a closed pool."""
        with self._pool.lock:
            self.wake()
        self._thread.join()

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._pool.is_closed:
                self._start_missing()
                self._listen()
                self._pool.on_heard()
        except BaseException as error:
            with self._pool.lock:
                self._pool.on_fault(f"nobody looks after its worker processes: {error!r}", error)
            self._pool.on_heard()
            raise
        finally:
            self._end()

    def _attended(self) -> list[Worker]:
        data = [key.data for key in self._selector.get_map().values()]
        return [one for one in data if isinstance(one, Worker)]

    def _start_missing(self) -> None:
        with self._pool.lock:
            missing = self._pool.missing()
        for _ in range(missing):
            try:
                process = ProcessGroup("copris_lightning.rollout.reward_process")
            except OSError as error:
                with self._pool.lock:
                    self._pool.on_fault(f"a worker process cannot be started: {error}", error)
                return
            with self._pool.lock:
                worker = self._pool.add(process)
            self._selector.register(process.channel, selectors.EVENT_READ, worker)
            self._selector.register(process.printed, selectors.EVENT_READ, process.printed)

    def _listen(self) -> None:
        """Wait for something, and act on all that has come; where nothing has, look at the clock.

        An answer that has come counts, however late this thread gets to read it: the time is that
        of before.
        """
        now = time.monotonic()
        with self._pool.lock:
            timeout = self._time_to_sleep()
        events = self._selector.select(timeout)
        with self._pool.lock:
            self._sleeps_until = _NOW
        heard = []
        for key, event in events:
            if key.data is None:
                self._woken.recv(1 << 10)
                continue
            if isinstance(key.data, Printed):
                self._show(key.data)
                continue
            if event & selectors.EVENT_WRITE:
                with self._pool.lock:
                    key.data.flush()
            if event & selectors.EVENT_READ:
                heard.append(key.data)
                self._hear(key.data)
        if events:
            self._last_event = time.monotonic()
        if now >= self._console.due:
            self._console.tell()
        is_look = now >= self._next_look
        if is_look:
            self._next_look = now + LOOK_S
        for worker in self._attended():
            if worker not in heard:
                self._look(worker, now, with_process=is_look)

    def _time_to_sleep(self) -> float | None:
        """Seconds until something must be looked at; ``None`` if others will say so. The lock is
        held."""
        if self._pool.is_closed or self._pool.missing():
            return 0.0
        workers = self._attended()
        for worker in workers:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.is_behind else 0)
            self._selector.modify(worker.process.channel, events, worker)
        now = time.monotonic()
        self._sleeps_until = min(self._console.due, *(worker.due for worker in workers), math.inf)
        # Not only while there is work: who keeps looking need not be woken for the next call.
        if any(worker.is_busy for worker in workers) or now < self._last_event + LOOK_S:
            self._sleeps_until = min(self._sleeps_until, self._next_look)
        return None if self._sleeps_until == math.inf else max(0.0, self._sleeps_until - now)

    def _show(self, printed: Printed) -> None:
        if printed not in self._selector.get_map():
            return  # its process was forgotten meanwhile
        lines = printed.read()
        if lines is None:
            self._selector.unregister(printed)
        else:
            self._console.show(lines)

    def _hear(self, worker: Worker) -> None:
        try:
            messages = worker.process.channel.receive()
        except (EOFError, OSError):
            self._on_death(worker)
            return
        with self._pool.lock:
            worker.hear(messages)
        if worker.is_over:
            self._forget(worker)

    def _look(self, worker: Worker, now: float, *, with_process: bool) -> None:
        if with_process and worker.process.has_ended():
            self._on_death(worker)
        elif now >= worker.due:
            with self._pool.lock:
                worker.on_due()
            if worker.is_over:
                self._forget(worker)

    def _on_death(self, worker: Worker) -> None:
        worker.process.wait(LOOK_S)
        worker.process.kill()
        self._console.show(worker.process.printed.rest())  # it may say why
        with self._pool.lock:
            worker.on_death(worker.process.how_it_ended())
        self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        self._selector.unregister(worker.process.channel)
        if worker.process.printed in self._selector.get_map():
            self._selector.unregister(worker.process.printed)
        worker.process.kill()
        self._console.show(worker.process.printed.rest())
        with self._pool.lock:
            worker.process.close()
            self._pool.remove(worker)

    def _end(self) -> None:
        """End idle workers gently, and busy ones at once."""
        workers = self._attended()
        by = time.monotonic() + _END_S
        with self._pool.lock:
            idle = [worker.process for worker in workers if worker.dismiss()]
        for process in idle:
            process.wait(max(0.0, by - time.monotonic()))
        for worker in workers:
            self._forget(worker)
        self._console.tell()
        self._selector.close()
        self._woken.close()
        self._waker.close()
