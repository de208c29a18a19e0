"""A progress bar that shows the rollout while it runs."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from copris_lightning.datamodules.training import RolloutProgress


class RolloutProgressBar(TQDMProgressBar):
    """Lightning's bar; during a rollout it shows groups ready, in flight and tokens/s."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._tokens = 0
        self._since: float | None = None

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
