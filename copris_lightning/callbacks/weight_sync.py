"""Pushes the trainer's weights to the engine, and checks that the engine computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from copris_lightning.callbacks.parity import (
    Difference,
    ParityProbe,
    Tolerance,
    check_repeatable,
)
from copris_lightning.callbacks.time_shares import TimeShares
from copris_lightning.core.batching import MicroBatch
from copris_lightning.datamodules.rollout import RolloutDataModule
from copris_lightning.datamodules.steps import WholeSteps
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.meeting import finish
from copris_lightning.policy.module import CoprisModule
from copris_lightning.policy.sharding import check_strategy
from copris_lightning.trainer_parts import datamodule

_MIXED_TOLERANCE = 0.05
"""Log-probs of engine and trainer in different precisions differ by about this much, in nats."""


class WeightSync(L.Callback):
    """After each batch's last optimizer step, the engine gets the weights and is probed.

    Weights are compared where the engine loads them, tensor by tensor, and the probe compares the
    engine's log-probs of a few trained trajectories with the trainer's. A weight that did not
    arrive ends the run, and so does an engine that computes something else from the same weights.
    The first sync comes before the first rollout, so that a restored run never generates with the
    weights the engine booted with.

    Args:
        parity_tolerance: largest difference of a token's log-prob, in nats. ``auto`` measures at
            the start how far engine and trainer differ on the same weights (about 1e-6 in fp32,
            0.1 where one computes in bf16) and allows a multiple of that; ``null`` switches the
            probe off.
        parity_sequences: trajectories compared at each sync.

    Raises:
        ConfigurationError: a number below its minimum.
    """

    def __init__(self, parity_tolerance: Tolerance = "auto", parity_sequences: int = 4) -> None:
        if parity_tolerance not in (None, "auto") and not float(parity_tolerance) > 0:
            raise ConfigurationError(
                f"WeightSync.parity_tolerance={parity_tolerance} must be > 0, auto or null"
            )
        if parity_sequences < 1:
            raise ConfigurationError(f"WeightSync.parity_sequences={parity_sequences} must be >= 1")
        self.parity_tolerance = parity_tolerance
        self.parity = ParityProbe(parity_tolerance, parity_sequences)
        self.version = 0
        self._trained_since = False
        self._is_synced = False
        self._synced_step = 0
        self._restored_step = 0
        self._steps = WholeSteps()
        self._shares = TimeShares()

    @property
    def worst_parity(self) -> float:
        """The largest difference seen after a sync, in nats."""
        return self.parity.worst

    def should_sync(self, trainer: L.Trainer, batch: MicroBatch) -> bool:
        """Whether to sync after this micro-batch: after a batch's last. Override to change it."""
        return batch.is_last

    # -- Lightning's hooks -----------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse modules that there is nothing to sync between."""
        if not isinstance(pl_module, CoprisModule):
            raise ConfigurationError(f"WeightSync needs a CoprisModule, got {type(pl_module)}")
        if not isinstance(datamodule(trainer), RolloutDataModule):
            raise ConfigurationError("WeightSync needs a RolloutDataModule")
        self._is_synced = False

    def check(self, trainer: L.Trainer) -> None:
        """Refuse strategies whose weights cannot be read, before an engine boots.

        Raises:
            ConfigurationError: names the setting to change.
        """
        check_strategy(trainer)
        theirs = getattr(datamodule(trainer).engine, "dtype", None)
        precision = getattr(trainer.lightning_module, "precision", None)
        ours = getattr(precision, "dtype", theirs)
        tolerance = self.parity_tolerance
        if tolerance is None or tolerance == "auto":
            return
        if theirs not in (None, ours) and tolerance < _MIXED_TOLERANCE:
            raise ConfigurationError(
                f"engine.engine_args.dtype={theirs} is not "
                f"precision.dtype={ours}: log-probs will differ by more than "
                f"WeightSync.parity_tolerance={tolerance}; set the same dtype, or the tolerance "
                f"to auto or {_MIXED_TOLERANCE} and more"
            )

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first rollout of a fit with validation."""
        self._first_sync(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first training rollout."""
        self._first_sync(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before ``validate``; within ``fit`` the engine is synced already, and validation is not
        counted as any part of training."""
        self._first_sync(trainer, pl_module)
        if datamodule(trainer).feed is not None:
            datamodule(trainer).feed.cycle.watch.switch(None)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before ``test``."""
        self._first_sync(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before ``predict``."""
        self._first_sync(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Sync; after a batch, log how well the two agree and where its time went."""
        self._trained_since = True
        cycle = datamodule(trainer).feed.cycle
        cycle.watch.move(outputs["waited_s"], "train", "idle")
        figures: dict[str, float] = {}
        is_due = self.should_sync(trainer, batch)
        if is_due or batch.is_last:
            finish(pl_module.device)
            cycle.watch.switch("idle")
        if is_due:
            # Used up; an engine on the same device can use what they occupy.
            pl_module.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            with cycle.watch.during("sync"):
                parity = self.sync(trainer, pl_module, self.version + 1)
            figures["sync/seconds"] = cycle.watch.read()["sync"]
            if parity is not None:
                figures["sync/parity_max_abs"] = parity.largest
                figures["sync/parity_mean_abs"] = parity.mean
        if batch.is_last:
            figures |= self._shares.figures(cycle.end(), pl_module)
        for name, value in figures.items():
            pl_module.log(name, value, rank_zero_only=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: MicroBatch, batch_idx: int
    ) -> None:
        """Refuse a step on a part of what it is weighted for."""
        self._steps.begin(trainer)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """From here on until the step is done, no checkpoint can be used."""
        self._steps.update()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Gradients are not saved: a checkpoint is one of whole optimizer steps."""
        self._steps.save(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let Lightning count as this run divides its batches."""
        self._steps.load(trainer, checkpoint)
        self._restored_step = checkpoint["global_step"]

    def state_dict(self) -> dict[str, Any]:
        """The version, after which optimizer step it was synced, and the floor of the probe."""
        floor = self.parity.floor
        return {
            "version": self.version,
            "synced_step": self._synced_step,
            "parity_floor": None if floor is None else [floor.largest, floor.mean],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting versions where the checkpoint stopped."""
        self.version = state_dict["version"]
        self._synced_step = state_dict["synced_step"]
        self._trained_since = self._restored_step > self._synced_step
        floor = state_dict.get("parity_floor")
        self.parity.floor = None if floor is None else Difference(*floor)

    # -- the sync itself -------------------------------------------------------------------

    def sync(
        self, trainer: L.Trainer, pl_module: L.LightningModule, version: int
    ) -> Difference | None:
        """Push the weights as ``version`` and probe.

        Returns:
            the difference of log-probs; ``None`` without a probe.

        Raises:
            WeightSyncError: the weights did not arrive.
            ParityError: they did, and the engine computes something else.
        """
        assert isinstance(pl_module, CoprisModule)
        data = datamodule(trainer)
        root = trainer.strategy.model

        def weights() -> Iterator[tuple[str, Tensor]]:
            return pl_module.named_weights(root)

        self.parity.before_sync(trainer, data)
        data.update_weights(weights, version)
        self.version = version
        self._synced_step = trainer.global_step
        self._trained_since, self._is_synced = False, True
        return self.parity.after_sync(trainer, data, weights, version)

    def _first_sync(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_synced:
            if datamodule(trainer).feed is not None:
                assert isinstance(pl_module, CoprisModule)
                pl_module.pack()
                check_repeatable(trainer, datamodule(trainer), pl_module)
            # A checkpoint taken between an optimizer step and its sync holds newer weights than
            # those that bear the saved version. If it was taken within a batch, the batch's own
            # sync comes before a take (what streams until then: docs/flows.md).
            feed = datamodule(trainer).feed
            is_newer = self._trained_since and not (feed and feed.batch.is_open)
            self.sync(trainer, pl_module, self.version + int(is_newer))
