"""How stale the trained tokens are, and what importance sampling makes of it, by lag."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchmetrics import Metric

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.estimator.corrections import effective_sample_share
from copris_lightning.core.estimator.estimator import Estimate
from copris_lightning.core.estimator.ratios import clamp_log_ratio
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.open_batch import restore, saved
from copris_lightning.trainer_parts import datamodule


class LagStatistics(Metric):
    """Figures of trained response tokens, in total and by lag; reduced over ranks.

    Args:
        max_lag: lags are counted apart up to this one; the last bin takes those beyond too.
    """

    full_state_update = False
    sums: Tensor
    lows: Tensor
    highs: Tensor
    largest: Tensor
    lag_sum: Tensor
    trajectories: Tensor
    mixed: Tensor

    RATIOS = ("is", "mismatch")
    """Ratios with a mean, extremes and an effective sample size."""

    MEANS = (
        "is/clip_fraction_low",
        "is/clip_fraction_high",
        "kl/behavior",
        "kl/mismatch",
        "kl/reference",
        "policy/entropy",
    )
    """What is averaged over tokens."""

    def __init__(self, max_lag: int = 16) -> None:
        super().__init__()
        rows = 1 + 2 * len(self.RATIOS) + len(self.MEANS)
        sums = torch.zeros(rows, max_lag + 1, dtype=torch.float64)
        extremes = torch.full((len(self.RATIOS), max_lag + 1), torch.inf, dtype=torch.float64)
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.add_state("lows", extremes, dist_reduce_fx="min")
        self.add_state("highs", -extremes, dist_reduce_fx="max")
        self.add_state("largest", torch.tensor(0), dist_reduce_fx="max")
        for name in ("lag_sum", "trajectories", "mixed"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        self.known: set[str] = set()
        """Names of the quantities that were given so far."""

    def update(self, estimate: Estimate) -> None:
        """Add a micro-batch."""
        mask, lags = estimate.mask, estimate.lags
        mismatch = estimate.mismatch
        quantities = {
            "is": estimate.ratio,
            "mismatch": None if mismatch is None else clamp_log_ratio(mismatch).exp(),
            "is/clip_fraction_low": estimate.clipped_low,
            "is/clip_fraction_high": estimate.clipped_high,
            "kl/behavior": estimate.behavior_kl,
            "kl/mismatch": estimate.mismatch_kl,
            "kl/reference": estimate.reference_kl,
            "policy/entropy": estimate.entropy,
        }
        chosen = {n: v[mask].double() for n, v in quantities.items() if v is not None}
        self.known |= set(chosen)
        if not mask.any():
            return
        bins = lags[mask].clamp(max=self.sums.shape[1] - 1)
        nothing = torch.zeros_like(bins, dtype=torch.float64)
        columns = [torch.ones_like(nothing)]
        for row, name in enumerate(self.RATIOS):
            columns += [chosen.get(name, nothing), chosen.get(name, nothing).square()]
            if name in chosen:
                self.lows[row].scatter_reduce_(0, bins, chosen[name], "amin")
                self.highs[row].scatter_reduce_(0, bins, chosen[name], "amax")
        columns += [chosen.get(name, nothing) for name in self.MEANS]
        self.sums.index_add_(1, bins, torch.stack(columns))
        self.largest = torch.maximum(self.largest, lags[mask].max())
        self.lag_sum += lags[mask].sum()
        self.trajectories += mask.any(dim=1).sum()
        lowest = torch.where(mask, lags, lags.max()).amin(dim=1)
        self.mixed += (torch.where(mask, lags, 0).amax(dim=1) > lowest).sum()

    def compute(self) -> dict[str, float]:
        """The metrics, by name; what is not known and bins without tokens are left out."""
        tokens = self.sums[0]
        count = float(tokens.sum())
        if not count:
            return {}
        figures = {
            "staleness/lag_mean": float(self.lag_sum) / count,
            "staleness/lag_max": float(self.largest),
            "staleness/mixed_fraction": float(self.mixed) / float(self.trajectories),
        }
        figures |= self._over(slice(None), "")
        for lag, n in enumerate(tokens.tolist()):
            if n:
                figures[f"staleness/token_fraction/lag_{lag}"] = n / count
                figures |= self._over(slice(lag, lag + 1), f"/lag_{lag}")
        return figures

    def _over(self, lags: slice, suffix: str) -> dict[str, float]:
        """Ratios and means over the tokens of some lags."""
        count, *sums = self.sums[:, lags].sum(dim=1).tolist()
        figures: dict[str, float] = {}
        for row, name in enumerate(self.RATIOS):
            if name in self.known:
                total, squares = sums[2 * row : 2 * row + 2]
                figures[f"{name}/ratio_mean"] = total / count
                figures[f"{name}/ratio_min"] = float(self.lows[row, lags].min())
                figures[f"{name}/ratio_max"] = float(self.highs[row, lags].max())
                figures[f"{name}/ess"] = effective_sample_share(total, squares, count)
        for name, total in zip(self.MEANS, sums[2 * len(self.RATIOS) :], strict=True):
            if name in self.known:
                figures[name] = total / count
        clipped = ("is/clip_fraction_low", "is/clip_fraction_high")
        figures["is/clip_fraction"] = sum(figures[name] for name in clipped)
        return {name + suffix: value for name, value in figures.items()}


class CorrectionStatistics(Metric):
    """What a correction does to the trained tokens; reduced over ranks."""

    full_state_update = False
    tokens: Tensor
    weights: Tensor
    squares: Tensor
    rejected: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("tokens", "weights", "squares", "rejected"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, weights: Tensor, mask: Tensor) -> None:
        """Add a micro-batch, both ``[B, R]``."""
        kept = weights[mask].double()
        self.tokens += kept.numel()
        self.weights += kept.sum()
        self.squares += kept.square().sum()
        self.rejected += (kept == 0).sum()

    def compute(self) -> dict[str, float]:
        """Mean weight, share of tokens left out, and effective sample size as a share."""
        count, total = float(self.tokens), float(self.weights)
        if not count:
            return {}
        return {
            "weight_mean": total / count,
            "rejected_fraction": float(self.rejected) / count,
            "ess": effective_sample_share(total, float(self.squares), count),
        }


class StalenessMonitor(L.Callback):
    """Logs lag (mean, max, histogram), mixed-version trajectories, and by lag: importance ratios,
    clipping, divergences and entropy; and what each correction does.

    Args:
        max_lag: lags are told apart up to this one.
    """

    def __init__(self, max_lag: int = 16) -> None:
        if max_lag < 0:
            raise ConfigurationError(f"StalenessMonitor.max_lag={max_lag} must be at least 0")
        self.statistics = LagStatistics(max_lag)
        self.corrections: dict[str, CorrectionStatistics] = {}
        self._at_step: dict[str, Any] = {}
        """Of the open batch, at its last whole optimizer step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget a batch that an earlier command left unfinished."""
        self._at_step, self.corrections = {}, {}
        self.statistics.reset()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count where the batches are, from where a checkpoint stopped."""
        self.statistics.to(pl_module.device)
        # Where the sync of a batch failed, nobody said that the batch was over.
        if not self._at_step or not datamodule(trainer).feed.batch.is_open:
            return
        self.statistics.known |= set(self._at_step["known"])
        for name in self._at_step["corrections"]:
            self.corrections[name] = CorrectionStatistics().to(pl_module.device)
        if trainer.is_global_zero:
            restore(self.statistics, self._at_step["lags"])
            for name, states in self._at_step["corrections"].items():
                restore(self.corrections[name], states)

    def state_dict(self) -> dict[str, Any]:
        """What the open batch's figures add up to."""
        return dict(self._at_step)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on adding up."""
        self._at_step = state_dict

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch; after a batch's last one, log."""
        estimate: Estimate = outputs["estimate"]
        self.statistics.update(estimate)
        for name, weights in estimate.corrections.items():
            if name not in self.corrections:
                self.corrections[name] = CorrectionStatistics().to(pl_module.device)
            self.corrections[name].update(weights, estimate.mask)
        if not batch.is_last:
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                self._at_step = {
                    "known": sorted(self.statistics.known),
                    "lags": saved(self.statistics),
                    "corrections": {n: saved(metric) for n, metric in self.corrections.items()},
                }
            return
        self._at_step = {}
        figures = self.statistics.compute()
        for name, statistics in self.corrections.items():
            for quantity, value in statistics.compute().items():
                figures[f"correction/{name}/{quantity}"] = value
            statistics.reset()
        for name, value in figures.items():
            pl_module.log(name, value, rank_zero_only=True)
        for logger in trainer.loggers:
            if figures and isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                self._add_histogram(logger, figures, trainer.global_step)
        self.statistics.reset()

    def _add_histogram(
        self, logger: TensorBoardLogger, figures: dict[str, float], step: int
    ) -> None:
        """Shares of the tokens by lag, over all ranks."""
        lags = range(self.statistics.sums.shape[1])
        shares = [figures.get(f"staleness/token_fraction/lag_{lag}", 0.0) for lag in lags]
        logger.experiment.add_histogram_raw(
            "staleness/lag",
            min=0,
            max=figures["staleness/lag_max"],
            num=1.0,
            sum=figures["staleness/lag_mean"],
            sum_squares=sum(lag * lag * n for lag, n in zip(lags, shares, strict=True)),
            bucket_limits=[lag + 0.5 for lag in lags],
            bucket_counts=shares,
            global_step=step,
        )
