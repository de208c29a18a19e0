"""Whole optimizer steps: where Lightning steps, and its counters in a checkpoint.

Gradients accumulated so far are in no checkpoint. So one that is taken within a step, at whatever
moment, says that the step has not begun: its first micro-batch is what a resumed run trains on
first, with the weights and the optimizer's state as they were then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from copris_lightning.errors import ConfigurationError
from copris_lightning.trainer_parts import datamodule

_TORN = "copris_lightning.torn"
_COUNTS = ("ready", "started", "processed", "completed")


class WholeSteps:
    """What the callback that knows the steps does about them; one per callback."""

    def __init__(self) -> None:
        self._is_updating = False

    def begin(self, trainer: Any) -> None:
        """Before a micro-batch: Lightning is to step after it if, and only if, it ends a step.

        Raises:
            ConfigurationError: something ended an epoch within a step.
        """
        self._is_updating = False
        loop = trainer.fit_loop
        # What loggers count by. After some kinds of restart Lightning is one ahead.
        loop.epoch_loop._batches_that_stepped = trainer.global_step
        feed = datamodule(trainer).feed
        if feed is not None and feed.ends_step == loop._should_accumulate():
            raise ConfigurationError(
                f"the optimizer would step on a part of batch {feed.batch.index}: something "
                "ended an epoch within a batch (a hook that skips the rest of one, or a loop that "
                "was changed while it ran); let epochs end by trainer.limit_train_batches"
            )

    def update(self) -> None:
        """The weights are about to change."""
        self._is_updating = True

    def save(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint one of whole steps."""
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if self._is_updating and progress.processed < progress.ready:
            checkpoint[_TORN] = True
        rewind(checkpoint["loops"]["fit_loop"], trainer.accumulate_grad_batches)

    def load(self, trainer: Any, checkpoint: dict[str, Any]) -> None:
        """Count as this run does, which may divide its batches in another way.

        Raises:
            ConfigurationError: the weights are those of no step.
        """
        refuse_torn(checkpoint, str(trainer.ckpt_path))
        data = datamodule(trainer)
        state = checkpoint.get(type(data).__qualname__)
        if data.feed is not None and state:
            # Under ZeRO-3 each rank reads a file of its own, and only rank 0's has the state.
            parts = data.ranks.share(lambda: state.get("parts"))
            loop = checkpoint["loops"]["fit_loop"]
            refit(loop, parts, data.feed.parts, data.feed.epoch)


def refuse_torn(checkpoint: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that was taken while the optimizer changed the weights.

    Raises:
        ConfigurationError: names it.
    """
    if checkpoint.get(_TORN):
        raise ConfigurationError(
            f"ckpt_path={name!r} was saved when an optimizer step was interrupted: some of its "
            "weights may be those before the step and some those after it; resume from an earlier "
            "checkpoint"
        )


def rewind(loop: dict[str, Any], micro_batches: int) -> None:
    """Set the fit loop's saved counters to where the running optimizer step begins.

    Args:
        loop: the state of Lightning's fit loop; is changed unless it is between two steps.
        micro_batches: of an optimizer step.
    """
    optimizer = _optimizer(loop)
    done = optimizer["step"]["current"]["completed"] * micro_batches
    if loop["epoch_loop.batch_progress"]["current"]["ready"] == done:
        return
    _move(loop, done, is_last=False)
    for scope in ("total", "current"):
        steps = optimizer["step"][scope]["completed"]
        optimizer["step"][scope]["ready"] = steps
        optimizer["zero_grad"][scope].update(ready=steps, started=steps, completed=steps)
    # A validation that was going on belongs to a later micro-batch.
    for scope in ("total", "current"):
        loop["epoch_loop.val_loop.batch_progress"][scope].update(dict.fromkeys(_COUNTS, 0))


def refit(loop: dict[str, Any], old: Sequence[int], new: Sequence[int], epoch: int) -> None:
    """Translate the fit loop's saved counters to another division of batches, or shorter epochs.

    Args:
        loop: the state of Lightning's fit loop, between two optimizer steps.
        old: ranks, updates and micro-batches that it counts by.
        new: those of this run.
        epoch: micro-batches of an epoch of this run.
    """
    progress = loop["epoch_loop.batch_progress"]
    done = progress["current"]["ready"]
    if old[1:] != new[1:]:
        # Within a batch the division cannot change, so these are whole ones.
        done = done // (old[1] * old[2]) * new[1] * new[2]
    elif done <= epoch:
        return
    is_last = progress["is_last_batch"] or done >= epoch
    done = min(done, epoch)
    _move(loop, done, is_last=is_last)
    steps = done // new[2]
    optimizer = _optimizer(loop)
    optimizer["step"]["current"].update(ready=steps, completed=steps)
    optimizer["zero_grad"]["current"].update(ready=steps, started=steps, completed=steps)


def _optimizer(loop: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    return found


def _move(loop: dict[str, Any], done: int, *, is_last: bool) -> None:
    """Say that so many micro-batches of the epoch are done, and none has begun."""
    progress = loop["epoch_loop.batch_progress"]
    total, current = progress["total"], progress["current"]
    before = total["ready"] - current["ready"]
    for name in _COUNTS:
        total[name], current[name] = before + done, done
    progress["is_last_batch"] = is_last


def epoch_micro_batches(trainer: Any, length: int) -> int:
    """Micro-batches of an epoch, as Lightning limits it.

    Args:
        trainer: its ``limit_train_batches`` is a number of them or a share.
        length: without a limit.
    """
    limit: int | float = trainer.limit_train_batches
    return min(length, limit) if isinstance(limit, int) else int(length * limit)
