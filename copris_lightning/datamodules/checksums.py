"""Whether the rollout's state in a checkpoint is what was saved, whatever the file went through.

The checksums of torch's archives are of bytes on a disk, and of no file in parts as a whole. These
are of values, from the moment at which they were taken out of the run to that at which a run goes
on from them.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from copris_lightning.errors import ConfigurationError

KEY = "checksums"
"""Where they are in the state."""


def with_checksums(state: dict[str, Any]) -> dict[str, Any]:
    """A state of plain values and tensors, with a checksum of each of its parts."""
    return {**state, KEY: {name: checksum(part) for name, part in state.items()}}


def refuse_changed(state: dict[str, Any]) -> None:
    """Compare a state with its checksums; what others added beside it has none.

    Raises:
        ConfigurationError: names the parts that are not what they were.
    """
    expected = state.get(KEY, {})
    wrong = [] if expected else [f"{KEY} are missing"]
    for name, value in expected.items():
        if name not in state:
            wrong.append(f"{name} is missing")
        elif checksum(state[name]) != value:
            wrong.append(f"{name} changed")
    if wrong:
        raise ConfigurationError(
            f"its rollout is not what was saved ({', '.join(wrong)}): go on from another "
            "checkpoint (--ckpt_path), or start a new run (without it)"
        )


def checksum(part: Any) -> int:
    """CRC-32 of a value: of its types, shapes and numbers, and of the order of its keys."""
    return zlib.crc32(repr(_shown(part)).encode())


def _shown(value: Any) -> Any:
    """The value with checksums for tensors."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), zlib.crc32(content.numpy().data)
    if isinstance(value, dict):
        return {key: _shown(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_shown, value)]
    return value
