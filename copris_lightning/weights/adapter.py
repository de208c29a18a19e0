"""LoRA adapters on their way to an engine: their shape, and the folder they are loaded from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

ADAPTER_ID = 1
"""vLLM's number of the only adapter."""


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
    ranks = {t.shape[0] for name, t in weights.items() if name.endswith(".lora_A.weight")}
    if not ranks:
        return None
    (rank,) = ranks
    return AdapterShape(rank, last_parts(name.rsplit(".", 2)[0] for name in weights))


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
