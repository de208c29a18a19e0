"""Checks of trainer, module and rollout against each other, before an engine boots.

All raise :class:`ConfigurationError`, which names the setting to change.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from copris_lightning.datamodules.batches import BatchShape
from copris_lightning.datamodules.protocols import WeightSyncer
from copris_lightning.datamodules.settings import KEY, RolloutSettings
from copris_lightning.errors import ConfigurationError
from copris_lightning.trainer_parts import callbacks, is_dry_run


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


def check_estimator(trainer: L.Trainer, settings: RolloutSettings) -> None:
    """Refuse what would spoil the importance ratio, and ratios that will not be known."""
    precision = str(trainer.precision)
    if precision in ("16-true", "bf16-true"):
        raise ConfigurationError(
            f"trainer.precision={precision} would round log-probs and advantages; set it to "
            "32-true or bf16-mixed, and model.init_args.dtype=bfloat16 for such weights"
        )
    module: Any = trainer.lightning_module
    estimator = getattr(module, "estimator", None)
    if estimator is None:
        return  # WeightSync refuses the module
    if estimator.needs_mismatch and settings.behavior_logprobs == "engine":
        raise ConfigurationError(
            f"{KEY}.behavior_logprobs=engine: model.init_args.corrections of the mismatch "
            "between engine and trainer need the trainer's log-probs too; set it to trainer"
        )


def check_epochs(trainer: L.Trainer, shape: BatchShape) -> None:
    """Refuse epochs that end within a batch: Lightning steps there, on a part of it."""
    if any(isinstance(c, GradientAccumulationScheduler) for c in callbacks(trainer)):
        raise ConfigurationError(
            "trainer.callbacks has a GradientAccumulationScheduler: batches are divided once, "
            "by trainer.accumulate_grad_batches"
        )
    limit = trainer.limit_train_batches
    per_batch = shape.updates * shape.micro_batches
    if is_dry_run(trainer) or trainer.max_epochs == 1 or not isinstance(limit, int):
        return
    if limit % per_batch:
        raise ConfigurationError(
            f"trainer.limit_train_batches={limit} ends an epoch within a batch of {per_batch} "
            f"micro-batches (trainer.accumulate_grad_batches={shape.micro_batches} x "
            f"{KEY}.updates_per_batch={shape.updates}); give a multiple of {per_batch}"
        )
