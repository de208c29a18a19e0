"""Which requests a simulated engine generates: as many as have a slot, and fit its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from copris_lightning.core.cap import Load
from copris_lightning.engines.simulated_tokens import KVCache


class Request(Protocol):
    """What a slot is for. ``kv_version`` is of its keys and values, ``None`` while it has none."""

    kv_version: int | None

    @property
    def length(self) -> int:
        """Its prompt and response so far, in tokens."""
        ...


R = TypeVar("R", bound=Request)


class Slots:
    """Gives slots out, as vLLM does: to those who have one, then to those who came first.

    Args:
        count: requests that are generated at once.
        cache: where their keys and values are; ``None``: there is room for all.
    """

    def __init__(self, count: int, cache: KVCache | None) -> None:
        self._count = count
        self.cache = cache
        self._load = Load(0, 0, 0.0)

    def load(self, going: int) -> Load:
        """How busy it is, with so many requests going on; with a KV cache, as of the last step."""
        if self.cache is not None:
            return self._load
        running = min(self._count, going)
        return Load(running, going - running)

    def fill(self, requests: Sequence[R], version: int) -> tuple[list[R], float]:
        """Who makes a token in the next step.

        Args:
            requests: all there are, in the order in which they came.
            version: of the weights that compute keys and values now.

        Returns:
            them, and what it takes to compute the keys and values that they lack, in seconds.
        """
        batch = list(requests[: self._count])
        if self.cache is not None:
            batch = self._fitting(requests, self.cache.tokens)
        new = [request for request in batch if request.kv_version is None]
        for request in new:
            request.kv_version = version
        prefix_s = 0.0 if self.cache is None else self.cache.prefix_s
        return batch, prefix_s * sum(request.length for request in new)

    def _fitting(self, requests: Sequence[R], tokens: int) -> list[R]:
        """As many as fit with a token more each, but one in any case."""
        running = [request for request in requests if request.kv_version is not None]
        room = tokens - sum(request.length + 1 for request in running)
        put_back = 0
        while room < 0 and len(running) > 1:
            last = running.pop()
            last.kv_version = None
            room += last.length + 1
            put_back += 1
        waiting = [request for request in requests if request.kv_version is None]
        for request in waiting if not put_back else ():
            room -= request.length + 1
            if len(running) == self._count or (running and room < 0):
                room += request.length + 1
                break
            running.append(request)
        self._load = Load(
            running=len(running),
            waiting=len(requests) - len(running),
            kv_usage=min(1.0, 1 - room / tokens),
            preemptions=self._load.preemptions + put_back,
        )
        return running
