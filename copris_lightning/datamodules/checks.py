"""Checks of trainer, module and rollout against each other, before an engine boots.

All raise :class:`ConfigurationError`, which names the setting to change.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from copris_lightning.datamodules.divide import BatchShape
from copris_lightning.datamodules.protocols import RunWriter, WeightSyncer
from copris_lightning.datamodules.settings import Flow
from copris_lightning.datamodules.steps import epoch_micro_batches
from copris_lightning.errors import ConfigurationError
from copris_lightning.trainer_parts import (
    callbacks,
    dry_run_batches,
    is_dry_run,
    log_every_n_steps,
)


def check_sync(trainer: L.Trainer) -> None:
    """Refuse a trainer that would never give the engine new weights, or cannot."""
    syncers = [c for c in callbacks(trainer) if isinstance(c, WeightSyncer)]
    if not syncers:
        raise ConfigurationError(
            "trainer.callbacks has no copris_lightning.WeightSync: the engine would generate "
            "with the weights it booted with, whatever was trained or restored"
        )
    for syncer in syncers:
        syncer.check(trainer)


def write_before_sync(trainer: Any) -> None:
    """Have callbacks that write batches down come before the one that syncs.

    A batch whose sync fails has been trained on: the run that goes on from there does not come to
    it again.
    """
    others = [c for c in callbacks(trainer) if not isinstance(c, RunWriter)]
    writers = [c for c in callbacks(trainer) if isinstance(c, RunWriter)]
    place = next(i for i, c in enumerate(others) if isinstance(c, WeightSyncer))
    trainer.callbacks = [*others[:place], *writers, *others[place:]]


def check_estimator(trainer: L.Trainer, flow: Flow) -> None:
    """Refuse what would spoil the importance ratio, and ratios that will not be known."""
    precision = str(trainer.precision)
    if precision in ("16-true", "bf16-true"):
        raise ConfigurationError(
            f"trainer.precision={precision} would round log-probs and advantages; set it to "
            "32-true or bf16-mixed, and precision.dtype=bfloat16 for such weights"
        )
    module: Any = trainer.lightning_module
    estimator = getattr(module, "estimator", None)
    if estimator is None:
        return  # WeightSync refuses the module
    if estimator.needs_mismatch and flow.source == "engine":
        raise ConfigurationError(
            "flow.behavior_logprobs=engine: estimator.corrections of the mismatch between engine "
            "and trainer need the trainer's log-probs too; set it to trainer (which takes "
            "flow.mode=staged and flow.kv=fresh)"
        )


def check_limits(trainer: L.Trainer) -> None:
    """Refuse a trainer that would boot an engine and train nothing, or against the gradient."""
    accumulated = trainer.accumulate_grad_batches
    if accumulated < 1:
        raise ConfigurationError(
            f"trainer.accumulate_grad_batches={accumulated} must be at least 1: it is the number "
            "of micro-batches of an optimizer step"
        )
    for name, value in (
        ("max_steps", trainer.max_steps),
        ("max_epochs", trainer.max_epochs),
        ("limit_train_batches", trainer.limit_train_batches),
    ):
        if value == 0:
            raise ConfigurationError(f"trainer.{name}=0 trains nothing; it must be above 0")
    if trainer.val_check_interval == 0:
        raise ConfigurationError("trainer.val_check_interval=0 must be above 0")
    every = trainer.check_val_every_n_epoch
    if every is not None and every < 1:
        raise ConfigurationError(
            f"trainer.check_val_every_n_epoch={every} must be at least 1, or null to count "
            "micro-batches over epochs"
        )
    interval = log_every_n_steps(trainer)
    if trainer.loggers and 0 < trainer.max_steps < interval:
        rank_zero_warn(
            f"trainer.log_every_n_steps={interval}: a run of "
            f"{trainer.max_steps} steps logs nothing; set it to 1"
        )
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < math.inf:
        raise ConfigurationError(
            f"trainer.gradient_clip_val={clip} must be a number above 0, or null for no clipping"
        )


def check_optimizer(trainer: L.Trainer) -> None:
    """Make the optimizer and its schedule for a parameter of no model, to see whether they can be
    made: the real ones are made after the engine has booted."""
    module: Any = trainer.lightning_module
    if not callable(getattr(module, "optimizer", None)):
        return  # a module of another kind, which WeightSync refuses
    try:
        optimizer = module.optimizer([nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"optimizer: {error}") from error
    for name, value in optimizer.defaults.items():
        numbers = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise ConfigurationError(f"optimizer.{name}={value} must be a finite number")
    if module.lr_scheduler is not None:
        try:
            module.lr_scheduler(optimizer)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigurationError(f"lr_scheduler: {error}") from error


def check_epochs(trainer: L.Trainer, shape: BatchShape, length: int) -> None:
    """Refuse epochs that end within a batch: Lightning steps there, on a part of it.

    A ``fast_dev_run`` of N is made one of N whole batches.

    Args:
        trainer: limits epochs.
        shape: how batches are divided.
        length: micro-batches of an epoch without limits.
    """
    if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks(trainer)):
        raise ConfigurationError(
            "trainer.callbacks has a GradientAccumulationScheduler: batches are divided once, "
            "by trainer.accumulate_grad_batches"
        )
    overfit = getattr(trainer, "overfit_batches", 0)
    if overfit:
        raise ConfigurationError(
            f"trainer.overfit_batches={overfit}: prompts come from a stream, and no "
            f"batch is trained on again; to overfit, give task.prompts with few of them"
        )
    if is_dry_run(trainer):
        batches = dry_run_batches(trainer)
        trainer.limit_train_batches = batches * shape.per_batch
        trainer.fit_loop.epoch_loop.max_steps = batches * shape.updates
    limit = trainer.limit_train_batches
    planned = epoch_micro_batches(trainer, length)
    if planned % shape.per_batch or (limit and not planned):
        raise ConfigurationError(
            f"trainer.limit_train_batches={limit} of {length} ends an epoch within a batch, at "
            f"micro-batch {planned}. A batch has {shape.per_batch} micro-batches "
            f"(trainer.accumulate_grad_batches={shape.micro_batches} x "
            f"batch.updates={shape.updates}); give a multiple of {shape.per_batch}, "
            f"such as {max(1, planned // shape.per_batch) * shape.per_batch}"
        )
    check = trainer.val_check_interval
    is_count = isinstance(check, int) and trainer.check_val_every_n_epoch is not None
    if is_count and check > planned and not is_dry_run(trainer):
        raise ConfigurationError(
            f"trainer.val_check_interval={check} exceeds the {planned} micro-batches of an epoch; "
            "set trainer.check_val_every_n_epoch=null to count over epochs, or lower it"
        )
