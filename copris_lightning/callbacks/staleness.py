"""How stale the trained tokens are, and what importance sampling makes of it, by lag."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics import Metric

from copris_lightning.core.batching import MicroBatch


class LagStatistics(Metric):
    """Sums over response tokens, by lag; reduced over ranks.

    Args:
        max_lag: lags are counted apart up to this one; the last bin takes those beyond too.
    """

    full_state_update = False
    tokens: Tensor
    ratios: Tensor
    squares: Tensor
    clipped: Tensor
    largest: Tensor
    lag_sum: Tensor
    trajectories: Tensor
    mixed: Tensor

    def __init__(self, max_lag: int = 16) -> None:
        super().__init__()
        zeros = torch.zeros(max_lag + 1, dtype=torch.float64)
        for name in ("tokens", "ratios", "squares", "clipped"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0), dist_reduce_fx="max")
        for name in ("lag_sum", "trajectories", "mixed"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, lags: Tensor, mask: Tensor, ratio: Tensor, clipped: Tensor) -> None:
        """Add a micro-batch, every argument ``[B, R]``."""
        selected = lags[mask]
        bins = selected.clamp(max=len(self.tokens) - 1)
        weights = ratio[mask].double()
        self.tokens.index_add_(0, bins, torch.ones_like(weights))
        self.ratios.index_add_(0, bins, weights)
        self.squares.index_add_(0, bins, weights.square())
        self.clipped.index_add_(0, bins, clipped[mask].double())
        if selected.numel():
            self.largest = torch.maximum(self.largest, selected.max())
        self.lag_sum += selected.sum()
        self.trajectories += len(lags)
        lowest = torch.where(mask, lags, lags.max()).amin(dim=1) if lags.numel() else lags
        self.mixed += ((lags * mask).amax(dim=1) > lowest).sum()

    def compute(self) -> dict[str, float]:
        """The metrics, by name; bins without tokens are left out."""
        count = float(self.tokens.sum())
        ratios, squares = float(self.ratios.sum()), float(self.squares.sum())
        figures = {
            "staleness/lag_mean": float(self.lag_sum) / count,
            "staleness/lag_max": float(self.largest),
            "staleness/mixed_fraction": float(self.mixed) / float(self.trajectories),
            "is/ratio_mean": ratios / count,
            "is/clip_fraction": float(self.clipped.sum()) / count,
            # Kish's effective sample size as a share of the tokens.
            "is/ess": ratios**2 / (count * squares),
        }
        for lag, tokens in enumerate(self.tokens.tolist()):
            if tokens:
                figures[f"staleness/token_fraction/lag_{lag}"] = tokens / count
                figures[f"is/ratio_mean/lag_{lag}"] = float(self.ratios[lag]) / tokens
                figures[f"is/clip_fraction/lag_{lag}"] = float(self.clipped[lag]) / tokens
        return figures


class StalenessMonitor(L.Callback):
    """Logs lag (mean, max, histogram), mixed-version trajectories, and IS ratios by lag.

    Args:
        max_lag: lags are told apart up to this one.
    """

    def __init__(self, max_lag: int = 16) -> None:
        self.statistics = LagStatistics(max_lag)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count where the batches are."""
        self.statistics.to(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; after a batch's last one, log."""
        self.statistics.update(
            batch.lags, batch.response_mask, outputs["ratio"], outputs["clipped"]
        )
        if not batch.is_last:
            return
        for name, value in self.statistics.compute().items():
            pl_module.log(name, value, rank_zero_only=True)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                self._add_histogram(logger, trainer.global_step)
        self.statistics.reset()

    def _add_histogram(self, logger: TensorBoardLogger, step: int) -> None:
        counts = self.statistics.tokens.tolist()
        lags = range(len(counts))
        logger.experiment.add_histogram_raw(
            "staleness/lag",
            min=0,
            max=float(self.statistics.largest),
            num=sum(counts),
            sum=sum(lag * n for lag, n in zip(lags, counts, strict=True)),
            sum_squares=sum(lag * lag * n for lag, n in zip(lags, counts, strict=True)),
            bucket_limits=[lag + 0.5 for lag in lags],
            bucket_counts=counts,
            global_step=step,
        )
