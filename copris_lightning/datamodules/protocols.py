"""What the data module asks of callbacks, without knowing any."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import lightning as L

from copris_lightning.core.batching import MicroBatch
from copris_lightning.datamodules.stage_meter import RolloutProgress


@runtime_checkable
class RolloutListener(Protocol):
    """A callback that wants to be told how a rollout gets on while the main thread waits."""

    def on_rollout_progress(self, progress: RolloutProgress) -> None:
        """Called about five times a second."""
        ...


@runtime_checkable
class WeightSyncer(Protocol):
    """The callback that decides when the engine gets new weights."""

    def should_sync(self, trainer: L.Trainer, batch: MicroBatch) -> bool:
        """Whether to sync after this micro-batch."""
        ...

    def check(self, trainer: L.Trainer) -> None:
        """Refuse a trainer whose weights it cannot read."""
        ...


@runtime_checkable
class RunWriter(Protocol):
    """A callback that writes files of a run."""

    def open(self, trainer: L.Trainer, stage: str) -> None:
        """Called on every rank before the engine boots.

        Raises:
            ConfigurationError: it cannot write there, or what stands there is another run's.
        """
        ...
