"""A progress bar that counts batches, and shows the rollout while it runs."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from copris_lightning.core.batching import MicroBatch
from copris_lightning.datamodules.stage_meter import RolloutProgress
from copris_lightning.trainer_parts import datamodule


class RolloutProgressBar(TQDMProgressBar):
    """Lightning's bar, one for the whole run: batches trained, of how many, and the time left.

    During a rollout it shows groups ready, in flight and tokens/s.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._tokens = 0
        self._since: float | None = None

    def init_train_tqdm(self) -> Tqdm:
        """A bar over all batches of the run; a resumed one starts where the first one stopped."""
        bar = super().init_train_tqdm()
        bar.initial = bar.n = datamodule(self.trainer).feed.trained_batches
        bar.total = run_batches(self.trainer)
        return bar

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The bar goes on over the epochs."""
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Count a batch once its last micro-batch was trained on."""
        if not batch.is_last:
            return
        done = datamodule(trainer).feed.trained_batches
        if self._should_update(done, self.train_progress_bar.total):
            self.train_progress_bar.n = done
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The bar goes on over the epochs."""
        if self.is_enabled:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    def on_rollout_progress(self, progress: RolloutProgress) -> None:
        """Show where the rollout is; tokens/s are those since it began, on the wall clock."""
        now = time.perf_counter()
        if self._since is None or progress.tokens < self._tokens:
            self._since = now
        self._tokens = progress.tokens
        elapsed = now - self._since
        rate = f"{progress.tokens / elapsed:,.0f}" if elapsed > 0.1 else "-"
        if self.is_enabled and self._train_progress_bar is not None:
            self.train_progress_bar.set_description_str(
                f"rollout {progress.ready_groups}/{progress.batch_groups} groups, "
                f"{progress.in_flight}/{progress.cap} in flight, {rate} tokens/s"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Back to Lightning's own text."""
        self._since = None
        if self.is_enabled:
            self.train_progress_bar.set_description_str(f"Epoch {trainer.current_epoch}")
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The reward beside the bar, in place of the version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        reward = trainer.callback_metrics.get("train/reward")
        if reward is not None:
            metrics["reward"] = f"{float(reward):.3f}"
        return metrics


def run_batches(trainer: L.Trainer) -> int | None:
    """How many batches the run will have trained at its end, or ``None`` if it has no end.

    Lightning counts micro-batches for epochs and optimizer steps for ``max_steps``.
    """
    shape = datamodule(trainer).feed.shape
    limits = []
    if trainer.max_steps > 0:
        limits.append(-(-trainer.max_steps // shape.updates))
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        per_batch = shape.updates * shape.micro_batches
        limits.append(-(-trainer.max_epochs * int(trainer.num_training_batches) // per_batch))
    return min(limits, default=None)
