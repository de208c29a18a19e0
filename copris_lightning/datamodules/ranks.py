"""Rank 0 rolls out; this hands every other rank its share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from copris_lightning.errors import RolloutError

T = TypeVar("T")


class Exchange:
    """Moves Python objects between ranks; with one process it does nothing.

    It has a gloo group of its own, so that ranks can wait for a rollout longer than the training
    group's time limit, and asleep.
    """

    def __init__(self) -> None:
        self._world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.rank = dist.get_rank() if self._world > 1 else 0
        self._group: Any = None
        if self._world > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._world

    def scatter(self, parts: list[T] | None) -> T:
        """Rank 0 gives one part per rank, the others ``None``; each gets its own."""
        if self._world == 1:
            assert parts is not None
            part = parts[0]
        else:
            received: list[Any] = [None]
            dist.scatter_object_list(received, parts, src=0, group=self._group)
            part = received[0]
        if isinstance(part, BaseException):
            raise part
        return part

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank; the others' are not looked at."""
        return self.scatter([value] * self._world if self.rank == 0 else None)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around what rank 0 does while the others have nothing to do: they wait for it.

        Raises:
            RolloutError: on the other ranks, where rank 0 raised in the block.
        """
        try:
            yield
        except BaseException as error:
            if self.rank == 0 and self._world > 1:
                failure = RolloutError(f"the rollout failed on rank 0: {error!r}")
                parts = [failure] * self._world
                dist.scatter_object_list([None], parts, src=0, group=self._group)
            raise
        self.broadcast(None)

    def gather(self, value: T) -> list[T] | None:
        """Every rank gives a value; rank 0 gets them all, in rank order."""
        if self._world == 1:
            return [value]
        values: list[Any] | None = [None] * self._world if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values
