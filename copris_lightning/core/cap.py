"""How many trajectories may be in flight: from what an engine says of its load to a limit.

A KV cache holds so many tokens, and how many trajectories that is depends on how long these are,
which nobody knows beforehand and which changes as a policy learns. Too few in flight, and the
engine idles; too many, and it puts some back and computes their keys and values again.

So the limit goes to what fits, little by little, as :class:`Cap` says. In steps and cuts it would
swing for ever: a response that begins takes little of the cache and far more later, so that what a
step did is seen only when the next one has been taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from copris_lightning.errors import ConfigurationError

TARGET = 0.9
"""Share of the KV cache that is to be in use. What is left is for those in flight to grow into: how
much all of them take varies, the more the fewer they are."""

INERTIA = 8
"""How many times the trajectories in flight end while the limit covers most of its way. What they
take of the cache in one moment says little, and is nearly the same a few ends later."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy an engine is.

    Attributes:
        running: requests that it is generating.
        waiting: requests that it has no room for yet.
        kv_usage: share of the KV cache that those running have, from 0 to 1; ``None`` if it does
            not tell.
        preemptions: requests put back for want of room, since it started.
    """

    running: int
    waiting: int
    kv_usage: float | None = None
    preemptions: int = 0


@dataclass(frozen=True)
class Cap:
    """Bounds on the trajectories in flight; equal ones are a fixed number.

    Attributes:
        least: so many may be in flight however full the KV cache is; where a run begins.
        most: never more than that.

    Raises:
        ConfigurationError: bounds that cannot be.
    """

    least: int = 16
    most: int = 256

    def __post_init__(self) -> None:
        for name in ("least", "most"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigurationError(f"{name}={value!r} must be a whole number from 1 on")
        if self.least > self.most:
            raise ConfigurationError(f"least={self.least} must be at most most={self.most}")

    def __str__(self) -> str:
        return str(self.most) if self.is_fixed else f"{{least: {self.least}, most: {self.most}}}"

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose."""
        return self.least == self.most

    def clip(self, limit: float) -> float:
        """The nearest limit within the bounds."""
        return min(max(limit, self.least), self.most)

    def __call__(
        self, load: Load | None, limit: float, *, preempted: int = 0, is_full: bool = True
    ) -> float:
        """The next limit, after one trajectory has ended.

        With n running on a share u of the cache, ``fits = n * TARGET / u`` of their size fit; each
        one put back since the last end counts as if they took as much again. With w waiting, the
        limit changes by ``(fits / limit - 1) / INERTIA - w / limit``, and by one place at most.

        Args:
            load: the engine's; ``None`` if it does not tell.
            limit: the present one. A fraction is a part of the way to the next place.
            preempted: requests put back since the last trajectory ended.
            is_full: whether all places were taken: only then the limit grows, and only while the
                engine lets nothing wait.
        """
        if self.is_fixed or load is None or load.kv_usage is None or not load.running:
            return self.clip(limit)
        taken = load.kv_usage * (1 + preempted)
        fits = load.running * TARGET / taken if taken else math.inf
        step = max(-1.0, min(1.0, (fits / limit - 1) / INERTIA - load.waiting / limit))
        may_grow = is_full and not load.waiting
        return self.clip(limit + (step if may_grow else min(0.0, step)))
