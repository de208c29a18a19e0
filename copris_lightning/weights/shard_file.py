"""A safetensors file that is written over in place, one tensor after the other, and mapped to read.

New memory and new files cost several times what copying into old ones does: the system clears every
page and maps it. So a tensor goes from where the trainer has it straight into a file that is there
already, and a reader maps the file instead of reading it.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

_DATA_AT = 2**16
"""Bytes from a file's begin to its first tensor's: the header, which is written last, is padded."""

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Path]:
    """Write tensors into files in order, over those of the same names, which keep their memory.

    Args:
        folder: holds ``shard-00000.safetensors`` and so on.
        tensors: each may be gone when the next is asked for.
        limit: bytes of a shard's tensors; it is larger only if it is one tensor.

    Yields:
        each file as soon as it is whole.

    Raises:
        OSError: there is no room for one.
    """
    shard: _Shard | None = None
    number = 0
    try:
        for name, tensor in tensors:
            if shard is not None and not shard.has_room_for(name, tensor, limit):
                yield shard.finish()
                number, shard = number + 1, None
            if shard is None:
                shard = _Shard(folder / f"shard-{number:05}.safetensors")
            shard.add(name, tensor)
        if shard is not None:
            yield shard.finish()
    finally:
        if shard is not None:
            shard.close()


class _Shard:
    """A file that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Not truncated: its pages are used again.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        self._entries: dict[str, dict[str, object]] = {}
        self._header_bytes = 0
        self._bytes = 0

    def has_room_for(self, name: str, tensor: Tensor, limit: int) -> bool:
        """Whether a tensor may follow the others."""
        return (
            self._bytes + tensor.nbytes <= limit
            and self._bytes % tensor.element_size() == 0
            and self._header_bytes + len(json.dumps(self._entry(name, tensor))) <= _DATA_AT - 8
        )

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, which may be gone afterwards."""
        entry = self._entry(name, tensor)
        self._entries |= entry
        self._header_bytes += len(json.dumps(entry))
        if tensor.numel():
            data = tensor.detach().cpu().contiguous()
            # Not through numpy: what it has seen cannot be resized, which FSDP does.
            memory = (ctypes.c_char * data.nbytes).from_address(data.data_ptr())
            self._write(memoryview(memory).cast("B"), _DATA_AT + self._bytes)
        self._bytes += tensor.nbytes

    def finish(self) -> Path:
        """Write the header: it is a safetensors file from now on."""
        header = json.dumps(self._entries).encode().ljust(_DATA_AT - 8)
        os.truncate(self._descriptor, _DATA_AT + self._bytes)
        self._write(len(header).to_bytes(8, "little") + header, 0)
        self.close()
        return self._path

    def close(self) -> None:
        """May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _entry(self, name: str, tensor: Tensor) -> dict[str, dict[str, object]]:
        return {
            name: {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [self._bytes, self._bytes + tensor.nbytes],
            }
        }

    def _write(self, data: bytes | memoryview, at: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._descriptor, left, at)
            left, at = left[written:], at + written


def mapped_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a safetensors file, each of a storage of its own, in the file's memory.

    Changing one does not change the file, but a file that is written over changes them.
    """
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if 0 in shape:
            yield name, torch.empty(shape, dtype=dtype)
            continue
        at = start + entry["data_offsets"][0]
        flat = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=at)
        yield name, flat.view(shape)
