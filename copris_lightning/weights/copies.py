"""Watches what a load copies where, whatever loads: by checksums that do not depend on an order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensors = Iterator[tuple[str, Tensor]]
"""By the names of a checkpoint."""

_CHUNK = {"cpu": 2**16}
"""Elements whose checksum is computed at a time: what a core's cache holds, 2**24 elsewhere."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def _mixed(tensor: Tensor) -> Tensor:
    """A number for each element (two for one of 64 bits) that its bits determine, 0 for zero."""
    bits = tensor.contiguous().view(_BITS[tensor.element_size()]).to(torch.int32) * 0x2C1B3C6D
    return bits.bitwise_xor_(bits >> 15)


def _chunk(tensor: Tensor) -> int:
    return _CHUNK.get(tensor.device.type, 2**24)


def checksum(tensor: Tensor) -> int:
    """Of a tensor's elements, whatever their order and however many zeros stand among them."""
    flat = tensor.detach().reshape(-1)
    parts = [_mixed(part).sum(dtype=torch.int64) for part in flat.split(_chunk(flat))]
    return int(torch.stack(parts).sum()) % 2**64 if parts else 0


def column_checksums(matrix: Tensor) -> Tensor:
    """One for each column, int64; together they are the matrix's."""
    parts = matrix.detach().split(max(1, _chunk(matrix) // matrix.shape[1]))
    return torch.stack([_mixed(part).sum(dim=0, dtype=torch.int64) for part in parts]).sum(dim=0)


@dataclass
class Written:
    """What was copied into a storage, by where: checksums, and the names it was made of."""

    storage: StorageWeakRef
    """Keeps the storage's number from being given to another; the memory is let go."""
    regions: dict[tuple[object, ...], int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    is_transformed: bool = False
    """Whether it was changed in another way than by copying: it need not be what was sent."""

    def agrees(self, total: int) -> bool:
        """Whether something of this checksum can be what was copied here."""
        return self.is_transformed or total == self.checksum

    @property
    def checksum(self) -> int:
        """Of all that was copied here."""
        return sum(self.regions.values()) % 2**64


class Copies(TorchDispatchMode):
    """Watches which tensors were copied where, within the block.

    Attributes:
        sent: the checksums of what was sent, by name.
        is_paused: looks away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = False
        self.sent: dict[str, int] = {}
        self._direct: set[int] = set()
        self._names: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self._written: dict[int, Written] = {}

    def watched(self, tensors: Tensors) -> Tensors:
        """The same tensors, recognized from then on."""
        for name, tensor in tensors:
            if not is_whole(tensor):
                tensor = tensor.clone()  # a storage for each, or they could not be told apart
            self.sent[name] = checksum(tensor)
            self._remember(tensor, {name})
            self._direct.add(tensor.untyped_storage()._cdata)
            yield name, tensor

    @property
    def used(self) -> set[str]:
        """The names of all that was copied anywhere."""
        return set().union(*(written.names for written in self._written.values()))

    def of(self, tensor: Tensor) -> Written | None:
        """What was copied into a parameter."""
        return self._written.get(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if self.is_paused:
            return result
        if func is torch.ops.aten.copy_.default:
            self._copied(args[0], args[1])
            return result
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                self._changed(value, func)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        names = set().union(*map(self._names_of, tensors))
        if names:
            for made in tree_leaves(result):
                if isinstance(made, Tensor) and not self._names_of(made):
                    self._remember(made, names)
        return result

    def _remember(self, tensor: Tensor, names: set[str]) -> None:
        storage = tensor.untyped_storage()
        self._names[storage._cdata] = (StorageWeakRef(storage), names)

    def _names_of(self, tensor: Tensor) -> set[str]:
        key = tensor.untyped_storage()._cdata
        if key in self._names:
            return self._names[key][1]
        return self._written[key].names if key in self._written else set()

    def _changed(self, tensor: Tensor, func: Any) -> None:
        """A tensor was changed in place. Padding with zeros leaves a checksum as it is."""
        key = tensor.untyped_storage()._cdata
        self._direct.discard(key)
        is_filled = func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)
        if key in self._written and not is_filled:
            self._written[key].is_transformed = True

    def _is_sent(self, tensor: Tensor) -> bool:
        """Whether it is a whole tensor as it was sent, whose checksum is known."""
        return is_whole(tensor) and tensor.untyped_storage()._cdata in self._direct

    def _copied(self, target: Tensor, source: Tensor) -> None:
        if target.is_meta or source.is_meta:
            return
        storage = target.untyped_storage()
        before = self.of(source)
        if before is not None and is_whole(source) and source.dtype == target.dtype:
            # Passed on: it still has to be what was sent.
            value = before.checksum
        elif (
            self._is_sent(source)
            and source.dtype == target.dtype
            and source.numel() == target.numel()
        ):
            (name,) = self._names_of(source)
            value = self.sent[name]
        else:
            value = checksum(source.expand(target.shape).to(target.dtype))
        names = self._names_of(source)
        written = self._written.get(storage._cdata)
        if written is None or is_whole(target):
            written = self._written[storage._cdata] = Written(StorageWeakRef(storage))
        where = (target.storage_offset(), tuple(target.shape), target.stride())
        written.regions[where] = value
        written.names |= names
        written.is_transformed |= before is not None and before.is_transformed


def is_whole(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
