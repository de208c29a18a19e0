"""How far the running stage is, for whoever watches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.rollout.scheduler import Event


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """Where the running stage is.

    Attributes:
        ready_groups: complete groups so far.
        batch_groups: how many end the stage.
        in_flight: trajectories in flight.
        cap: how many there may be.
        tokens: response tokens received in this stage.
    """

    ready_groups: int
    batch_groups: int
    in_flight: int
    cap: int
    tokens: int


class StageMeter:
    """Adds up a stage's events on the rollout thread; may be read from any."""

    def __init__(self) -> None:
        self.is_running = False
        """Whether a stage is going on."""
        self._tokens = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a stage."""
        self._tokens, self.is_running = 0, True
        try:
            yield
        finally:
            self.is_running = False

    def observe(self, event: Event) -> None:
        """Something happened in the stage."""
        if event.kind == "chunk":
            self._tokens += event.tokens

    def read(self, buffer: CarryOverBuffer) -> RolloutProgress:
        """Where the stage is."""
        return RolloutProgress(
            ready_groups=min(buffer.ready_groups, buffer.batch_groups),
            batch_groups=buffer.batch_groups,
            in_flight=buffer.in_flight,
            cap=buffer.limit,
            tokens=self._tokens,
        )
