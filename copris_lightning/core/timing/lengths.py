"""How long responses are: from a distribution, or as another run's were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from copris_lightning.errors import ConfigurationError


class Lengths(Protocol):
    """Where the lengths of a group's responses come from, before any limit cuts them."""

    def draw(self, random: Random, count: int) -> Sequence[float]:
        """The lengths of ``count`` responses to one prompt, in tokens."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """Independent of each other, the log of each normally distributed.

    Attributes:
        median: in tokens.
        sigma: standard deviation of the log; 0 makes all equal.
    """

    median: float
    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.median <= 1e9:
            raise ConfigurationError(f"median={self.median} must be above 0, and at most 1e9")
        if not 0 <= self.sigma <= 10:
            raise ConfigurationError(f"sigma={self.sigma} must be from 0 to 10")

    def draw(self, random: Random, count: int) -> Sequence[float]:
        """See :class:`Lengths`."""
        return [random.lognormvariate(math.log(self.median), self.sigma) for _ in range(count)]


@dataclass(frozen=True)
class Recorded:
    """Those of groups that were seen. Siblings stay together: hard prompts have long answers.

    Attributes:
        groups: the lengths of each group, in tokens. One of another size than is asked for is
            drawn from with replacement.
        cut_at: the limit that cut some of them; ``None`` if none did. How long these would have
            been is not known.
    """

    groups: Sequence[Sequence[int]]
    cut_at: int | None = None

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups):
            raise ConfigurationError(f"groups={self.groups!r} must hold lengths")

    def draw(self, random: Random, count: int) -> Sequence[float]:
        """See :class:`Lengths`."""
        group = random.choice(self.groups)
        return group if len(group) == count else random.choices(group, k=count)


class Draws:
    """The lengths of the groups of a run: the same ones however often it is simulated, and under
    every limit, so that flows and caps are compared on the same responses.

    Args:
        lengths: where they come from.
        group_size: G.
        seed: of all that is drawn.
    """

    def __init__(self, lengths: Lengths, group_size: int, seed: int = 0) -> None:
        self.group_size = group_size
        self._lengths = lengths
        self._random = Random(seed)
        self._drawn: list[Sequence[float]] = []

    def group(self, index: int, limit: int) -> list[int]:
        """Lengths of the G responses of a group, at least 1 and at most ``limit`` tokens."""
        while len(self._drawn) <= index:
            self._drawn.append(self._lengths.draw(self._random, self.group_size))
        return [max(1, min(limit, round(length))) for length in self._drawn[index]]
