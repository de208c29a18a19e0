"""LoRA adapters on their way to an engine: their shape, the folder they are loaded from, and
whether they arrived."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from copris_lightning.weights.copies import Tensors, checksum

ADAPTER_ID = 1
"""vLLM's number of the only adapter."""

_FIRST, _SECOND = ".lora_A.weight", ".lora_B.weight"
"""How the names of an adapter's two matrices end."""


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What an engine must know of adapters before they come.

    Attributes:
        rank: r.
        layers: the last parts of the names of the layers that have one, sorted.
    """

    rank: int
    layers: tuple[str, ...]


def adapter_shape(weights: Mapping[str, Tensor]) -> AdapterShape | None:
    """Of what :meth:`LoRA.adapters` yielded; ``None`` if these are other weights."""
    ranks = {t.shape[0] for name, t in weights.items() if name.endswith(_FIRST)}
    if not ranks:
        return None
    (rank,) = ranks
    return AdapterShape(rank, last_parts(name.rsplit(".", 2)[0] for name in weights))


def is_adapter(name: str) -> bool:
    """Whether a weight of this name is a part of what :meth:`LoRA.adapters` yields."""
    return name.endswith((_FIRST, _SECOND))


def last_parts(names: Iterable[str]) -> tuple[str, ...]:
    """Of dotted names, sorted, each once."""
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def as_folder(file: Path, shape: AdapterShape) -> Path:
    """The folder of a safetensors file, made one that peft and vLLM load an adapter from.

    Args:
        file: holds what :meth:`LoRA.adapters` yielded; is renamed.
        shape: of these.
    """
    config = {
        "peft_type": "LORA",
        "r": shape.rank,
        "lora_alpha": shape.rank,  # a scale of 1, since B holds it
        "target_modules": shape.layers,
    }
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    file.rename(file.parent / "adapter_model.safetensors")
    return file.parent


def adapter_report(tensors: Tensors, held: Iterable[Sequence[Tensor]]) -> dict[str, Any]:
    """Compare adapters with what an engine applies.

    Args:
        tensors: that were sent.
        held: for each of the engine's layers, the parts that it is stacked of, padded with zeros.

    Returns:
        as :meth:`~copris_lightning.weights.arrival.Arrival.report`.
    """
    sums: set[int] = set()
    dtype = torch.float32
    for parts in held:
        each = [checksum(part) for part in parts]
        # A model may have one layer where the engine has several, or the other way around.
        sums |= {*each, sum(each) % 2**64}
        dtype = parts[0].dtype
    named = list(tensors)
    stale = [name for name, tensor in named if checksum(tensor.to(dtype)) not in sums]
    return {
        "stale": sorted(stale),
        "missing": [],
        "unused": [],
        "not_compared": [],
        "tensors": len(named),
    }
