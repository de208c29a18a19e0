"""What work costs in seconds, and how much of it there is."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from copris_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Costs:
    """Seconds of what the engine and the trainer do.

    A decoding step with n in flight, which hold h tokens of keys and values, takes
    ``step_s + slot_s * n + kv_s * h``, or with ``steps`` what these say for n, ``+ kv_s * h``.

    Attributes:
        step_s: of a step, whatever is in it: weights are read, kernels started.
        slot_s: of a step, for each trajectory in flight.
        kv_s: of a step, for each token whose keys and values are read.
        prefix_s: of computing a token of a prefix: a prompt, or a response that goes on after its
            keys and values were dropped.
        train_s: of the trainer, per token that it trains on, scoring it included.
        batch_s: of the trainer, per batch, whatever it holds.
        sync_s: of new weights, while the engine is held.
        steps: ``(n, seconds)`` of measured steps, n rising: in between they are interpolated
            linearly, below the first it is that of the first, and above the last it grows as
            between the last two.
    """

    step_s: float = 0.0
    slot_s: float = 0.0
    kv_s: float = 0.0
    prefix_s: float = 0.0
    train_s: float = 0.0
    batch_s: float = 0.0
    sync_s: float = 0.0
    steps: Sequence[tuple[int, float]] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "steps" and not 0 <= value < math.inf:
                raise ConfigurationError(f"{field.name}={value} must be at least 0")
        numbers = [n for n, _ in self.steps]
        if numbers != sorted(set(numbers)) or any(n < 1 for n in numbers):
            raise ConfigurationError(f"steps={self.steps} must be of rising numbers from 1 on")
        if not all(0 <= seconds < math.inf for _, seconds in self.steps):
            raise ConfigurationError(f"steps={self.steps} must take at least 0 seconds")

    def step(self, in_flight: int) -> float:
        """Seconds of a step with so many in flight, but for their keys and values."""
        if not self.steps:
            return self.step_s + self.slot_s * in_flight
        last = len(self.steps) - 1
        right = min(bisect_left(self.steps, in_flight, key=lambda point: point[0]), last)
        (n, seconds), (m, more) = self.steps[max(0, right - 1)], self.steps[right]
        if m == n or in_flight <= self.steps[0][0]:
            return seconds
        return max(0.0, seconds + (more - seconds) * (in_flight - n) / (m - n))


class Work(NamedTuple):
    """What there was to do, or the mean of it per batch.

    Attributes:
        steps: decoding steps.
        slots: trajectories in flight, summed over the steps: tokens generated.
        kv: tokens whose keys and values were read, summed over the steps.
        prefix: tokens of prefixes that were computed.
        trained: tokens trained on.
        batches: batches trained on.
    """

    steps: float = 0
    slots: float = 0
    kv: float = 0
    prefix: float = 0
    trained: float = 0
    batches: float = 0

    def seconds(self, costs: Costs) -> float:
        """How long it takes where trainer and engine take turns.

        Raises:
            ValueError: ``costs.steps`` are given: how many were in flight at which step is not
                known here.
        """
        if costs.steps:
            raise ValueError("seconds of work need a step that grows linearly")
        return (
            costs.step_s * self.steps
            + costs.slot_s * self.slots
            + costs.kv_s * self.kv
            + costs.prefix_s * self.prefix
            + costs.train_s * self.trained
            + (costs.batch_s + costs.sync_s) * self.batches
        )
