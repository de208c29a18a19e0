"""Rank 0 has the engine and decides; the others are told how that ended, and get their share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from copris_lightning.errors import RolloutError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What another rank hears of rank 0's work: its part of the result, or how it failed."""

    part: Any = None
    failure: str | None = None


class Ranks:
    """The trainer's ranks; all of them call each method together. With one process it only calls.

    It has a gloo group of its own, so that ranks can wait for a rollout longer than the training
    group's time limit, and asleep.
    """

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self.waited_s = 0.0
        """Seconds that this rank has spent in meeting the others."""
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def deal(self, work: Callable[[], list[T]]) -> T:
        """Have rank 0 make one part per rank, in rank order; each gets its own.

        Raises:
            RolloutError: on the other ranks, where the work failed on rank 0; there it raises what
                the work raised.
        """
        if self.rank == 0:
            try:
                parts = work()
            except BaseException as error:
                self._scatter([_Outcome(failure=repr(error))] * self.size)
                raise
            self._scatter([_Outcome(part) for part in parts])
            return parts[0]
        outcome = self._scatter(None)
        if outcome.failure is not None:
            raise RolloutError(f"the rollout failed on rank 0: {outcome.failure}")
        part: T = outcome.part
        return part

    def share(self, work: Callable[[], T]) -> T:
        """Have rank 0 work out something that every rank gets. Raises as :meth:`deal`."""
        return self.deal(lambda: [work()] * self.size)

    def lead(self, work: Callable[[], T]) -> T | None:
        """Have rank 0 do something while the others wait; its result, and ``None`` on the others.
        Raises as :meth:`deal`."""
        results: list[T] = []

        def alone() -> list[None]:
            results.append(work())
            return [None] * self.size

        self.deal(alone)
        return results[0] if results else None

    def together(self, work: Callable[[], T]) -> T:
        """Every rank does its part, the others besides rank 0; its own part's result. Raises as
        :meth:`deal`, once all have done theirs."""
        if self.rank > 0:
            own = work()
            self.lead(work)
            return own
        result = self.lead(work)
        return cast("T", result)

    def gather(self, value: T) -> list[T] | None:
        """Every rank gives a value; rank 0 gets them all, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._meeting():
            dist.gather_object(value, values, dst=0, group=self._group)
        return values

    def _scatter(self, outcomes: list[_Outcome] | None) -> _Outcome:
        received: list[Any] = [None]
        if self.size > 1:
            with self._meeting():
                dist.scatter_object_list(received, outcomes, src=0, group=self._group)
        outcome: _Outcome = received[0]
        return outcome

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - began
