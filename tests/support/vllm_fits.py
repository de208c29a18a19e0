"""Fits on vLLM that keep what was trained on, for several test files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from builders import small_data, small_module
from copris_testing import SomePrompts
from lightning.pytorch.loggers import CSVLogger
from some_rewards import ShareOfDigits

from copris_lightning import StalenessMonitor, TrajectoryLedger, VLLMEngine, WeightSync
from copris_lightning.core.estimator.corrections import Correction
from copris_lightning.core.trajectory import PromptGroup

SIZES: dict[str, Any] = {
    "cap": 20,
    "groups": 4,
    "group_size": 2,
    "max_prompt_tokens": 16,
    "timeout_s": 120.0,  # two whole runs had a call past 30 s, for a reason not found
    "max_new_tokens": 96,
}


FEW: dict[str, Any] = {"cap": 4, "max_staleness": 1, "max_new_tokens": 240}
"""Fewer in flight than a batch takes: while rewards are awaited, not many batches' worth of
responses can finish, and what a stage cuts is in one of the next batches."""


class Recorder(L.Callback):
    """Keeps, per batch, what was delivered and what the step computed; and weights by version."""

    def __init__(self, sync: WeightSync) -> None:
        self.sync = sync
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.batches: list[list[PromptGroup]] = []
        self.ratios: list[torch.Tensor] = []
        self.mismatch: list[torch.Tensor] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        # Before the first step on a batch the trainer holds what the last stage was made with.
        self.weights.setdefault(
            self.sync.version,
            {k: v.clone() for k, v in pl_module.policy.model.state_dict().items()},
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        estimate = outputs["estimate"]
        self.ratios.append(estimate.ratio[estimate.mask])
        if estimate.mismatch_kl is not None:
            self.mismatch.append(estimate.mismatch_kl[estimate.mask])
        if batch.is_last:
            self.batches.append(trainer.datamodule.feed.batch.groups)


def fit(
    checkpoint: Path,
    engine: VLLMEngine,
    directory: Path,
    *,
    lr: float,
    steps: int,
    temperature: float = 0.8,
    corrections: Sequence[Correction] = (),
    **data: Any,
) -> tuple[L.Trainer, Recorder]:
    module = small_module(checkpoint, lr=lr, corrections=list(corrections))
    datamodule = small_data(
        checkpoint,
        engine,
        prompts=SomePrompts(),
        reward=ShareOfDigits(),
        temperature=temperature,
        **{**SIZES, **data},
    )
    sync = WeightSync()
    recorder = Recorder(sync)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        logger=CSVLogger(directory),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[sync, StalenessMonitor(), TrajectoryLedger(), recorder],
    )
    trainer.fit(module, datamodule=datamodule)
    return trainer, recorder
