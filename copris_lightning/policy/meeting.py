"""Where ranks meet in training, and how long one waits there for the others."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


def sum_over_ranks(strategy: Any, values: Tensor) -> tuple[list[float], float]:
    """The ranks' sums, and the seconds that this rank waited for the others.

    Args:
        strategy: the trainer's.
        values: ``[N]``.
    """
    finish(values.device)
    began = time.perf_counter()
    sums: list[float] = strategy.reduce(values, reduce_op="sum").tolist()
    return sums, time.perf_counter() - began


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock shows it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
