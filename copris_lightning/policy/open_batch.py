"""Figures that add up over a batch, kept as they were at its last whole optimizer step.

A checkpoint taken within a step is one of where the step begins, so these figures must be too: a
resumed run adds the step's micro-batches again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric

_OPEN_BATCH = "copris_lightning.open_batch"


def saved(metric: Metric) -> dict[str, Tensor]:
    """A metric's states, reduced over the ranks, which must all ask; the metric stays as it is."""
    with metric.sync_context():
        states: dict[str, Any] = metric.metric_state
        return {name: state.detach().cpu().clone() for name, state in states.items()}


def restore(metric: Metric, states: dict[str, Tensor]) -> None:
    """Set a metric to what :func:`saved` gave; on one rank only, since it is of all of them."""
    for name, state in states.items():
        setattr(metric, name, state.to(metric.device))


class OpenBatch:
    """What the module adds up over a batch.

    Args:
        loss: the mean loss of its micro-batches.
    """

    def __init__(self, loss: MeanMetric) -> None:
        self.quarantined = 0
        """Trajectories that were left out of the loss so far, over all ranks."""
        self._loss = loss
        self._at_steps: dict[int, dict[str, Any]] = {}

    def reset(self) -> None:
        """Forget a batch that an earlier command left unfinished."""
        self.quarantined, self._at_steps = 0, {}
        self._loss.reset()

    def keep(self, trainer: Any, batch_idx: int, *, is_last: bool) -> None:
        """Remember the figures, if a micro-batch is the last before an optimizer step.

        Args:
            trainer: knows the steps that were taken.
            batch_idx: of the micro-batch, which is added already.
            is_last: whether it is the batch's last.
        """
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Whether the step will be taken is known only once it was: both sides of it are kept.
        now, after = trainer.global_step, {}
        if not is_last:
            after = {"loss": saved(self._loss), "quarantined": self.quarantined}
        self._at_steps = {now: self._at_steps.get(now, {}), now + 1: after}

    def save(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """Put what was kept at the last optimizer step into a checkpoint."""
        checkpoint[_OPEN_BATCH] = self._at_steps.get(trainer.global_step, {})

    def load(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """Go on from what was saved."""
        figures = checkpoint.get(_OPEN_BATCH)
        if figures:
            self._at_steps = {checkpoint["global_step"]: figures}
            self.quarantined = figures["quarantined"]
            if trainer.is_global_zero:
                restore(self._loss, figures["loss"])
