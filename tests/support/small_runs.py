"""Small whole runs from a config in a directory, for tests of where runs write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from copris_lightning import SimulatedEngine
from copris_lightning.__main__ import main
from copris_lightning.engines.engine import EngineSpec

CALLBACKS = ("WeightSync", "TrajectoryLedger", "RunSummary")
LOGGERS: dict[str, Any] = {
    "tensorboard": {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "mine"},
    },
    "csv": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": "mine"},
    },
    "none": False,
    "default": True,
    "without directories": {"class_path": "small_runs.Plain"},
}


class Plain(Logger):
    """A logger whose directory is not a run's, as WandbLogger's is not."""

    name = "mine"
    version = "same"
    save_dir = "runs"

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...


def settle(directory: Path, checkpoint: Path) -> None:
    """Write ``run.yaml``: two batches, each with a checkpoint."""
    data = {
        "task": {
            "prompts": {
                "class_path": "copris_lightning.quickstart.task.DivisionPrompts",
                "init_args": {"size": 64},
            },
            "scoring": {"reward": {"class_path": "some_rewards.Parity"}},
            "sampling": {"max_new_tokens": 32},
            "max_prompt_tokens": 32,
        },
        "engine": {"class_path": "copris_lightning.SimulatedEngine"},
        "flow": {"cap": 8},
        "batch": {"groups": 2, "group_size": 2},
        "evaluations": {
            on: {
                "prompts": {"class_path": "copris_testing.SomePrompts", "init_args": {"size": 4}},
                "on": on,
            }
            for on in ("validate", "predict")
        },
    }
    config = {
        "model": {
            "class_path": "copris_lightning.CoprisModule",
            "init_args": {"model": str(checkpoint)},
        },
        "data": {"class_path": "copris_lightning.RolloutDataModule", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "logger": False,
            "callbacks": [
                *({"class_path": f"copris_lightning.{n}"} for n in CALLBACKS),
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
                },
            ],
        },
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(config))


async def boot(self: SimulatedEngine, spec: EngineSpec) -> None:
    """In the place of ``SimulatedEngine.start``, where nothing may start."""
    pytest.fail("the engine was booted")


def change(home: Path, **trainer: Any) -> None:
    config = yaml.safe_load((home / "run.yaml").read_text())
    callbacks = trainer.pop("more_callbacks", [])
    config["trainer"].update(trainer)
    config["trainer"]["callbacks"] += callbacks
    (home / "run.yaml").write_text(yaml.safe_dump(config))


def copris(command: str, *options: str) -> int:
    return main([command, "--config", "run.yaml", *options])


def batches(directory: Path) -> list[int]:
    return sorted(int(p.stem.split("_")[1]) for p in directory.glob("ledger/batch_*.jsonl"))


class Fails(L.Callback):
    """Fails after a step, or in ``setup``."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if os.environ["FAIL_AT"] == "-1":
            raise RuntimeError("on purpose")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if str(trainer.global_step) == os.environ["FAIL_AT"]:
            raise RuntimeError("on purpose")
