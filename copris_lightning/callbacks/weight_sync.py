"""Pushes the trainer's weights to the engine, and checks that the engine computes with them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.trajectory import Segment, Trajectory
from copris_lightning.datamodules.rollout import RolloutDataModule
from copris_lightning.datamodules.steps import WholeSteps
from copris_lightning.errors import ConfigurationError, ParityError
from copris_lightning.module import CoprisModule
from copris_lightning.parallel import check_strategy, score
from copris_lightning.rollout.engine import Weights
from copris_lightning.trainer_parts import datamodule

_MIXED_TOLERANCE = 0.05
"""Log-probs of engine and trainer in different precisions differ by about this much, in nats."""


class WeightSync(L.Callback):
    """After each batch's last optimizer step, the engine gets the weights and is probed.

    The probe compares the engine's log-probs of a few trained trajectories with the trainer's. A
    sync that did not change what the engine computes, or changed it to something else, ends the
    run with an error that names what differs. The first sync comes before the first rollout, so
    that a restored run never generates with the weights the engine booted with.

    Args:
        parity_tolerance: largest difference of a token's log-prob, in nats. About 1e-6 is seen in
            fp32; bf16 engines need 0.1 and more. ``null`` switches the probe off.
        parity_sequences: trajectories compared at each sync.

    Raises:
        ConfigurationError: a number below its minimum.
    """

    def __init__(self, parity_tolerance: float | None = 1e-4, parity_sequences: int = 4) -> None:
        if parity_tolerance is not None and parity_tolerance <= 0:
            raise ConfigurationError(f"WeightSync.parity_tolerance={parity_tolerance} must be > 0")
        if parity_sequences < 1:
            raise ConfigurationError(f"WeightSync.parity_sequences={parity_sequences} must be >= 1")
        self.parity_tolerance = parity_tolerance
        self.parity_sequences = parity_sequences
        self.version = 0
        self.worst_parity = 0.0
        self._trained_since = False
        self._is_synced = False
        self._synced_step = 0
        self._restored_step = 0
        self._steps = WholeSteps()

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
        ours = getattr(trainer.lightning_module, "dtype_name", theirs)
        tolerance = self.parity_tolerance
        if theirs not in (None, ours) and tolerance is not None and tolerance < _MIXED_TOLERANCE:
            raise ConfigurationError(
                f"data.init_args.engine.init_args.engine_args.dtype={theirs} is not "
                f"model.init_args.dtype={ours}: log-probs will differ by more than "
                f"WeightSync.parity_tolerance={tolerance}; set the same dtype, or a tolerance of "
                f"{_MIXED_TOLERANCE} and more"
            )

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first rollout of a fit with validation."""
        self._first_sync(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first training rollout."""
        self._first_sync(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before ``validate``; within ``fit`` the engine is synced already."""
        self._first_sync(trainer, pl_module)

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
        outputs: STEP_OUTPUT,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Sync, and log how long it took and how well the two agree."""
        self._trained_since = True
        if not self.should_sync(trainer, batch):
            return
        # Used up; an engine on the same device can use what they occupy.
        pl_module.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        started = time.perf_counter()
        parity = self.sync(trainer, pl_module, self.version + 1)
        pl_module.log("sync/seconds", time.perf_counter() - started, rank_zero_only=True)
        if parity is not None:
            pl_module.log("sync/parity_max_abs", parity, rank_zero_only=True)

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
        """The version, and after which optimizer step it was synced."""
        return {"version": self.version, "synced_step": self._synced_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting versions where the checkpoint stopped."""
        self.version = state_dict["version"]
        self._synced_step = state_dict["synced_step"]
        self._trained_since = self._restored_step > self._synced_step

    # -- the sync itself -------------------------------------------------------------------

    def sync(self, trainer: L.Trainer, pl_module: L.LightningModule, version: int) -> float | None:
        """Push the weights as ``version`` and probe.

        Returns:
            the largest difference of a log-prob, in nats; ``None`` without a probe.

        Raises:
            WeightSyncError: the weights did not arrive.
            ParityError: they did, and the engine computes something else.
        """
        assert isinstance(pl_module, CoprisModule)
        data = datamodule(trainer)
        root = trainer.strategy.model

        def weights() -> Iterator[tuple[str, Tensor]]:
            return pl_module.named_weights(root)

        data.update_weights(weights, version)
        self.version = version
        self._synced_step = trainer.global_step
        self._trained_since, self._is_synced = False, True
        if self.parity_tolerance is None:
            return None
        return self._probe(trainer, data, weights)

    def _first_sync(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._is_synced:
            # A checkpoint taken between an optimizer step and its sync holds newer weights than
            # those that bear the saved version. If it was taken within a batch, the batch's own
            # sync comes before anything is generated for training.
            training = datamodule(trainer).training
            is_newer = self._trained_since and not (training and training.has_open_batch)
            self.sync(trainer, pl_module, self.version + int(is_newer))

    def _probe(self, trainer: L.Trainer, data: RolloutDataModule, weights: Weights) -> float | None:
        """The worst difference; all ranks take part in the forward pass."""
        assert data.exchange is not None
        assert self.parity_tolerance is not None
        names: list[str] = []
        sequences: list[list[int]] = []
        scores: list[list[float]] | None = None
        batch: MicroBatch | None = None
        with data.exchange.leading():
            if data.session is not None:
                names, sequences = data.probe_sequences(self.parity_sequences)
                scores = data.session.call(data.engine.score(sequences))
                batch = None if scores is None else _probe_batch(sequences)
        batch = data.exchange.broadcast(batch)
        if batch is None:
            return None
        ours = score(trainer, batch)
        worst, where = data.exchange.broadcast(_worst(names, sequences, ours, scores or []))
        self.worst_parity = max(self.worst_parity, worst)
        if worst > self.parity_tolerance:
            whole = data.whole_weights(weights)
            with data.exchange.leading():
                if data.session is not None:
                    cause = data.session.call(data.engine.explain_mismatch(whole.items()))
                    raise ParityError(
                        f"after the sync of version {self.version} the engine's log-probs differ "
                        f"from the trainer's by up to {worst:.3g} nats, tolerance "
                        f"WeightSync.parity_tolerance={self.parity_tolerance}; worst at {where}. "
                        f"{cause}"
                    )
        return worst


def _worst(
    names: Sequence[str],
    sequences: Sequence[Sequence[int]],
    ours: Tensor,
    theirs: Sequence[Sequence[float]],
) -> tuple[float, str]:
    """The largest difference of a log-prob, and where it is."""
    worst, where = 0.0, ""
    for name, sequence, row, values in zip(names, sequences, ours, theirs, strict=False):
        difference = (row[: len(values)] - torch.tensor(values)).abs()
        # A value that is not a number is the worst of all.
        difference = torch.where(difference.isnan(), torch.inf, difference)
        position = int(difference.argmax())
        if float(difference[position]) >= worst:
            worst = float(difference[position])
            where = (
                f"token {position + 1} (id {sequence[position + 1]}) of prompt {name!r}: "
                f"engine {values[position]:.6f}, trainer {float(row[position]):.6f}"
            )
    return worst, where


def _probe_batch(sequences: Sequence[Sequence[int]]) -> MicroBatch:
    """Whole sequences as responses to their first token, at temperature 1."""
    rows = []
    for i, tokens in enumerate(sequences):
        segment = Segment(0, list(tokens[1:]), [0.0] * (len(tokens) - 1))
        rows.append(Trajectory(0, i, "probe", (tokens[0],), len(tokens), [segment]))
    return collate(rows, source=None)
