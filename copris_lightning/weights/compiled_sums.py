"""Checksums of memory that this processor sees, compiled: torch goes through it five times."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from copris_lightning.weights.copies import FACTOR, SHIFT


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]  # numba's own
def _mixed(bits: Any) -> Any:
    product = np.int32(np.int32(bits) * np.int32(FACTOR))
    return product ^ (product >> np.int32(SHIFT))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]  # numba's own
def total(bits: Any) -> int:
    """Of a flat array of integers."""
    found = np.int64(0)
    for i in range(bits.shape[0]):
        found += _mixed(bits[i])
    return int(found)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]  # numba's own
def add_columns(bits: Any, sums: Any) -> None:
    """Add those of a matrix's columns to a flat array of int64."""
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            sums[j] += _mixed(bits[i, j])
