"""Columns of a trajectory: arrays of four bytes a value."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
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


Rows = tuple[Tensor, Tensor]
"""Columns of many trajectories: the values of all, one after another, and their lengths, int64;
-1 for one that is not there."""

_DTYPES = {"i": torch.int32, "q": torch.int64, "f": torch.float32, "d": torch.float64}


def not_finite(column: array[float]) -> int | None:
    """Where the first value that is not a finite number stands; ``None`` if there is none."""
    if math.isfinite(sum(column)):  # floats of four bytes add up to a finite one of eight
        return None
    return next(i for i, value in enumerate(column) if not math.isfinite(value))


def tensor_of(column: array[Any] | bytearray, typecode: str) -> Tensor:
    """A column as a tensor, whose memory it is from then on."""
    dtype = _DTYPES[typecode]
    return torch.frombuffer(column, dtype=dtype) if column else torch.empty(0, dtype=dtype)


def joined(typecode: str, rows: Sequence[array[Any] | None]) -> Rows:
    """A copy of columns, one after another.

    Args:
        typecode: of all columns.
        rows: the columns; ``None`` for one that is not there.
    """
    lengths = array("q", [-1 if row is None else len(row) for row in rows])
    values = bytearray().join([row for row in rows if row])
    return tensor_of(values, typecode), tensor_of(lengths, "q")


def split(rows: Rows) -> Iterator[Any]:
    """The inverse of :func:`joined`: columns of their own, or ``None``."""
    values, lengths = rows
    code = next(code for code, dtype in _DTYPES.items() if dtype == values.dtype)
    whole = array(code, [0]) * len(values)
    tensor_of(whole, code).copy_(values)
    start = 0
    for length in lengths.tolist():
        yield whole[start : start + length] if length >= 0 else None
        start += max(length, 0)
