"""What Lightning's connectors put on a trainer at run time, which its annotations do not know."""

from __future__ import annotations

from typing import Any

import lightning as L


def callbacks(trainer: Any) -> list[L.Callback]:
    """The trainer's callbacks."""
    found: list[L.Callback] = trainer.callbacks
    return found


def datamodule(trainer: Any) -> Any:
    """The data module of the running command, or ``None``."""
    return getattr(trainer, "datamodule", None)


def is_dry_run(trainer: Any) -> bool:
    """Whether this is a ``fast_dev_run``."""
    return bool(trainer.fast_dev_run)


def dry_run_batches(trainer: Any) -> int:
    """How many batches a ``fast_dev_run`` is of."""
    return int(trainer.fast_dev_run)


def log_every_n_steps(trainer: Any) -> int:
    """How many optimizer steps apart the loggers are told."""
    return int(trainer.log_every_n_steps)
