"""Watches what a load copies where, whatever loads: by checksums that do not depend on an order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Tensors = Iterator[tuple[str, Tensor]]
"""By the names of a checkpoint."""

looking_away = _disable_current_modes
"""A block within which copies are not watched, and cost nothing more."""

FACTOR, SHIFT = 0x2C1B3C6D, 15

_CHUNK = 2**24
"""Elements whose checksum is computed at a time."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def checksum(tensor: Tensor) -> int:
    """Of a tensor's elements, whatever their order and however many zeros stand among them."""
    flat = _bits(tensor.reshape(-1))
    if flat.device.type == "cpu":
        from copris_lightning.weights.compiled_sums import total

        return int(total(flat.numpy())) % 2**64
    parts = [_mixed(part).sum(dtype=torch.int64) for part in flat.split(_CHUNK)]
    return int(torch.stack(parts).sum()) % 2**64 if parts else 0


def column_checksums(matrix: Tensor) -> Tensor:
    """One for each column, int64; together they are the matrix's."""
    bits = _bits(matrix)
    if bits.device.type == "cpu":
        from copris_lightning.weights.compiled_sums import add_columns

        sums = torch.zeros(bits.shape[1], dtype=torch.int64)
        add_columns(bits.numpy(), sums.numpy())
    else:
        parts = bits.split(max(1, _CHUNK // bits.shape[1]))
        sums = torch.stack([_mixed(part).sum(dim=0, dtype=torch.int64) for part in parts]).sum(0)
    if bits.shape == matrix.shape:
        return sums
    return sums.view(matrix.shape[1], -1).sum(1)  # of elements of 64 bits


def _bits(tensor: Tensor) -> Tensor:
    """Its elements' bits, as integers; an element of 64 bits is two."""
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def _mixed(bits: Tensor) -> Tensor:
    """A number for each element that its bits determine, 0 for zero."""
    product = bits.to(torch.int32) * FACTOR
    return product.bitwise_xor_(product >> SHIFT)


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
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}
        self._direct: set[int] = set()
        self._names: dict[int, tuple[StorageWeakRef, set[str]]] = {}
        self._written: dict[int, Written] = {}

    def watched(self, tensors: Tensors) -> Tensors:
        """The same tensors, recognized from then on."""
        for name, tensor in tensors:
            with looking_away():
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
        if func is torch.ops.aten.copy_.default:
            self._copied(args[0], args[1])
            return result
        for index in _written_by(func):
            if index < len(args) and isinstance(args[index], Tensor):
                self._changed(args[index], func)
        names = set().union(*map(self._names_of, _tensors_in((*args, *(kwargs or {}).values()))))
        if names:
            for made in _tensors_in((result,)):
                if not self._names_of(made):
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


@cache
def _written_by(func: Any) -> tuple[int, ...]:
    """Which of its arguments an operator changes."""
    return tuple(i for i, a in enumerate(func._schema.arguments) if a.is_write)


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def is_whole(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
