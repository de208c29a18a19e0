"""A few lines at the end of a run: what was gained, how fast, and where the time went."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from copris_lightning.callbacks.whole_run import time_lines, trained_tokens_per_s
from copris_lightning.core.batching import MicroBatch
from copris_lightning.rollout.figures import TokenBalance
from copris_lightning.runs.directory import directory_of
from copris_lightning.trainer_parts import datamodule


class RunSummary(L.Callback):
    """Prints reward, speed and what binds it, carry-over, staleness and parity when ``fit`` ends.

    List it after the callbacks whose metrics it shows. All figures are since this start of the run.

    Args:
        first: batches that make up the reward at the start.
        last: batches that make up the reward at the end.
    """

    def __init__(self, first: int = 3, last: int = 10) -> None:
        self.first = first
        self.last = last
        self.history: dict[str, list[float]] = defaultdict(list)
        self._directory = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out where the run writes."""
        self._directory = directory_of(trainer)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Remember the batch's figures."""
        if batch.is_last:
            for name, value in trainer.callback_metrics.items():
                self.history[name].append(float(value))

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the summary."""
        rewards = self.history["train/reward"]
        if not rewards:
            return
        start, end = rewards[: self.first], rewards[-self.last :]
        lines = [
            f"reward            {_mean(start):.3f} (first {len(start)} batches) -> "
            f"{_mean(end):.3f} (last {len(end)})",
            *self._time_lines(),
            self._line("stage time", "rollout/stage_s", "{:.2f} s"),
            self._line("carried over", "rollout/carried_over", "{:.1f} trajectories a stage"),
            self._line("mixed versions", "staleness/mixed_fraction", "{:.1%} of trajectories"),
            self._line("lag", "staleness/lag_mean", "{:.2f} versions"),
        ]
        parity = self.history["sync/parity_max_abs"]
        if parity:
            lines.append(f"worst parity      {max(parity):.2e} nats in {len(parity)} syncs")
        lines.append(_balance(datamodule(trainer).feed.balance()))
        lines.append(f"logs              {_shown(self._directory)}")
        title = f"{len(rewards)} batches trained"
        print("\n".join(["", title, "-" * len(title), *(line for line in lines if line)]))

    def _time_lines(self) -> list[str]:
        lines = time_lines(self.history)
        if lines:
            lines.insert(0, ("trained tokens/s", f"{trained_tokens_per_s(self.history):,.0f}"))
        return [f"{label:<17} {text}" for label, text in lines]

    def _line(self, label: str, name: str, form: str) -> str:
        values = self.history[name]
        return f"{label:<17} {form.format(_mean(values))}" if values else ""


def _balance(balance: TokenBalance) -> str:
    """Where every response token is that was generated, or restored from a checkpoint."""
    restored = f" + {balance.restored:,} restored" if balance.restored else ""
    rules = ", ".join(f"{rule} {count:,}" for rule, count in balance.dropped.items())
    dropped = sum(balance.dropped.values())
    return (
        f"tokens            {balance.generated:,} generated{restored} = "
        f"{balance.delivered:,} trained + {balance.carried:,} carried over + {dropped:,} dropped"
        + (f" ({rules})" if rules else "")
        + (f" + {balance.missing:,} MISSING, which is a bug" if balance.missing else "")
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _shown(directory: Path) -> Path:
    """Relative to the working directory, if it is in it."""
    here = Path.cwd()
    return directory.relative_to(here) if directory.is_relative_to(here) else directory
