"""How a response ended, what it was worth, and what training makes of it: values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a reward said of a response: a finite number, or why there is none.

    Attributes:
        reward: ``None`` where there is a fault.
        parts: what the reward is made of, by name, for whoever looks at it.
        fault: why there is no reward, in words.

    Raises:
        ValueError: both a reward and a fault or neither, or a reward that is not finite.
    """

    reward: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    fault: str | None = None

    def __post_init__(self) -> None:
        if (self.reward is None) == (self.fault is None):
            raise ValueError(f"{self}: a verdict has a reward or a fault")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"{self}: a reward that is not finite is a fault")

    @classmethod
    def of(cls, reward: float) -> Verdict:
        """The verdict of any number: one that is not finite is a fault."""
        if math.isfinite(reward):
            return cls(reward)
        return cls(None, fault=f"its reward is {reward}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a response ended, and what it was worth.

    Attributes:
        finish_reason: ``"stop"`` (a stop token or string) or ``"length"`` (the limit).
        verdict: ``None`` while it is awaited.
    """

    finish_reason: FinishReason
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Excluded:
    """Why a trajectory is left out of the loss.

    Attributes:
        reason: in words.
        is_quarantined: whether something about it is not a finite number, so that nothing of it
            may be used; otherwise its group is still compared with it.
    """

    reason: str
    is_quarantined: bool = True


TRUNCATED = Excluded("truncated", is_quarantined=False)
"""It hit the limit, where such are not trained on."""


@dataclass(frozen=True, slots=True)
class Credit:
    """What training makes of a trajectory.

    Attributes:
        advantage: relative to its group.
        excluded: why it is left out of the loss; ``None`` if it is trained on.
    """

    advantage: float
    excluded: Excluded | None = None
