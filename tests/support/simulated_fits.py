"""Whole fits on the simulated engine that write down what happened, for several test files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from builders import small_data, small_module
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from copris_lightning import (
    CoprisModule,
    RolloutDataModule,
    SimulatedEngine,
    StalenessMonitor,
    TrajectoryLedger,
    WeightSync,
)
from copris_lightning.engines.simulated import Faults, LengthModel


class LoggingEngine(SimulatedEngine):
    """Writes down every sync."""

    def __init__(self, log: list[str], **kwargs: Any) -> None:
        super().__init__(LengthModel(median=12, sigma=1.0), **kwargs)
        self.log = log
        self.closed = 0

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await super().update_weights(weights, version)
        self.log.append(f"sync {version}")

    async def close(self) -> None:
        self.closed += 1
        await super().close()


class LoggingModule(CoprisModule):
    """Writes down every training step."""

    log_: list[str]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_.append("train")
        return super().training_step(batch, batch_idx)


def build(
    checkpoint: Path,
    directory: Path,
    *,
    lr: float = 0.1,
    faults: Faults | None = None,
    callbacks: Sequence[L.Callback] = (),
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[L.Trainer, LoggingModule, RolloutDataModule, list[str]]:
    log: list[str] = []
    module = small_module(checkpoint, LoggingModule, **{"lr": lr, **(model or {})})
    module.log_ = log
    datamodule = small_data(checkpoint, LoggingEngine(log, faults=faults), **(data or {}))
    datamodule.observers.append(lambda e: log.append("collect") if e.kind == "deliver" else None)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 6,
        "logger": CSVLogger(directory),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        **trainer,
    }
    chosen = [WeightSync(), StalenessMonitor(), TrajectoryLedger(str(directory)), *callbacks]
    return L.Trainer(callbacks=chosen, **options), module, datamodule, log


def ledger(directory: Path) -> list[dict[str, Any]]:
    files = sorted((directory / "ledger").glob("batch_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
