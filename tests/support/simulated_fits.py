"""Whole fits on the simulated engine that write down what happened, for several test files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from builders import small_data, small_module
from lightning.pytorch.loggers import CSVLogger

from copris_lightning import (
    CoprisModule,
    RolloutDataModule,
    SimulatedEngine,
    StalenessMonitor,
    TrajectoryLedger,
    WeightSync,
)
from copris_lightning.engines.simulated_tokens import Faults, KVCache, LengthModel
from copris_lightning.weights.transport import Run, Transport, Weights


class LoggingEngine(SimulatedEngine):
    """Writes down every sync: the release after weights were sent."""

    def __init__(self, log: list[str], **kwargs: Any) -> None:
        super().__init__(LengthModel(median=12, sigma=1.0), **kwargs)
        self.log = log
        self.closed = 0
        self.is_sent = False

    def transport(self, rank: int, run: Run) -> Transport:
        return Noting(super().transport(rank, run), self)

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        await super().release(version, clear_kv=clear_kv)
        if self.is_sent:
            self.log.append(f"sync {version}")
        self.is_sent = False

    async def close(self) -> None:
        self.closed += 1
        await super().close()


class Noting:
    """Tells the engine that weights were sent."""

    def __init__(self, transport: Transport, engine: LoggingEngine) -> None:
        self.transport = transport
        self.engine = engine

    def send(self, weights: Weights) -> None:
        self.transport.send(weights)
        self.engine.is_sent = True

    def explain(self, weights: Weights) -> str:
        return self.transport.explain(weights)

    def close(self) -> None:
        self.transport.close()


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
    kv_cache: KVCache | None = None,
    callbacks: Sequence[L.Callback] = (),
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **trainer: Any,
) -> tuple[L.Trainer, LoggingModule, RolloutDataModule, list[str]]:
    log: list[str] = []
    module = small_module(checkpoint, LoggingModule, **{"lr": lr, **(model or {})})
    module.log_ = log
    engine = LoggingEngine(log, faults=faults, kv_cache=kv_cache)
    datamodule = small_data(checkpoint, engine, **(data or {}))
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
