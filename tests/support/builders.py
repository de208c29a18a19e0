"""Small modules and data modules, of which a test names only what it is about.

Settings go by their own names, whichever object they belong to: ``small_data(path, engine, cap=4,
temperature=0.7)``.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from copris_testing import SomePrompts
from some_rewards import parity

from copris_lightning import (
    BatchSize,
    CoprisModule,
    Credit,
    Estimator,
    Flow,
    Memory,
    Precision,
    RolloutDataModule,
    Sampling,
    Scoring,
    Task,
)
from copris_lightning.engines.engine import Engine

SMALL: dict[str, Any] = {
    "reward": parity,
    "cap": 12,
    "groups": 4,
    "group_size": 2,
    "max_prompt_tokens": 16,
    "max_new_tokens": 48,
}

M = TypeVar("M", bound=CoprisModule)
T = TypeVar("T")


def small_data(checkpoint: Path, engine: Engine, **settings: Any) -> RolloutDataModule:
    """A data module with a cap of 12, and batches of 4 prompts x 2 of at most 48 tokens."""
    given = {"prompts": SomePrompts(24), **SMALL, **settings}
    scoring, sampling = _taken(Scoring, given), _taken(Sampling, given)
    task = _taken(Task, given, scoring=scoring, sampling=sampling)
    parts = {
        "flow": _taken(Flow, given),
        "batch": _taken(BatchSize, given),
        "credit": _taken(Credit, given),
    }
    return RolloutDataModule(str(checkpoint), task, engine, **parts, **given)


def small_module(
    checkpoint: Path, cls: type[M] = CoprisModule, *, lr: float | None = None, **settings: Any
) -> M:
    """A module; with ``lr``, trained by plain gradient descent."""
    given = dict(settings)
    if lr is not None:
        given["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=lr)
    parts = {
        "estimator": _taken(Estimator, given),
        "precision": _taken(Precision, given),
        "memory": _taken(Memory, given),
    }
    return cls(str(checkpoint), **parts, **given)


def _taken(cls: type[T], given: dict[str, Any], **parts: Any) -> T:
    """One of the settings' objects, whose fields are taken out of what was given."""
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # a dataclass
    return cls(**parts, **{name: given.pop(name) for name in names if name in given})
