"""Columns of a trajectory: arrays of four bytes a value."""

from __future__ import annotations

import math
from array import array
from typing import Any, Literal

import torch
from torch import Tensor

Source = Literal["engine", "trainer", "proximal"]
"""Whose log-probs a trajectory may hold: the engine's that sampled the tokens, the trainer's under
the weights that made them, and those under the version that training starts from."""
WHOSE: dict[Source, str] = {
    "engine": "the engine's",
    "trainer": "the trainer's",
    "proximal": "the proximal policy's",
}


def not_finite(column: array[float]) -> int | None:
    """Where the first value that is not a finite number stands; ``None`` if there is none."""
    if math.isfinite(sum(column)):  # floats of four bytes add up to a finite one of eight
        return None
    return next(i for i, value in enumerate(column) if not math.isfinite(value))


def tensor_of(column: array[Any]) -> Tensor:
    """A copy of a column: ``"i"`` as int32, ``"f"`` as float32."""
    dtype = torch.int32 if column.typecode == "i" else torch.float32
    return torch.frombuffer(column, dtype=dtype).clone() if column else torch.empty(0, dtype=dtype)
