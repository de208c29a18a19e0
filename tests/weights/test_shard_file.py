"""A shard is written into the memory of the last one, and read where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from copris_lightning.weights.shard_file import mapped_tensors, write_shards

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float64,
]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name]
        .view(-1)
        .view(torch.uint8)
        .equal(b[name].contiguous().view(-1).view(torch.uint8))
        for name in a
    )


def test_a_file_is_what_safetensors_reads_and_what_is_mapped(tmp_path: Path) -> None:
    sent = {str(dtype): torch.randn(8, 3).to(dtype) for dtype in DTYPES}
    sent |= {
        "empty": torch.empty(0, 4),
        "number": torch.tensor(2.5),
        "turned": torch.randn(4, 2).t(),
    }
    (path,) = write_shards(tmp_path, sent.items(), 10**9)
    assert same(dict(mapped_tensors(path)), sent)
    read = load_file(path)
    assert same({name: read[name] for name in sent}, sent)


def test_a_shard_is_written_into_the_last_ones_memory(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [("a", torch.ones(9)), ("b", torch.ones(3))], 10**9)
    before = path.stat()
    (path,) = write_shards(tmp_path, [("c", torch.zeros(5))], 10**9)
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size - 7 * 4)
    assert same(dict(mapped_tensors(path)), {"c": torch.zeros(5)})


def test_a_mapped_tensor_has_its_own_storage_and_cannot_change_the_file(tmp_path: Path) -> None:
    sent = {"a": torch.ones(9), "b": torch.ones(3)}
    (path,) = write_shards(tmp_path, sent.items(), 10**9)
    first = dict(mapped_tensors(path))
    assert first["b"].untyped_storage().nbytes() == 12
    first["a"].zero_()
    assert same(dict(mapped_tensors(path)), sent)


def test_a_header_that_is_full_begins_another_shard(tmp_path: Path) -> None:
    sent = {f"{i:05}{'x' * 1000}": torch.ones(1) for i in range(200)}
    paths = list(write_shards(tmp_path, sent.items(), 10**9))
    assert 3 < len(paths) < 6
    assert same({n: t for path in paths for n, t in mapped_tensors(path)}, sent)


def test_a_shard_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "shard-00000.safetensors").mkdir()
    with pytest.raises(OSError, match="shard-00000"):
        list(write_shards(tmp_path, [("a", torch.ones(1))], 1))


def test_what_was_written_can_still_be_resized_by_its_owner(tmp_path: Path) -> None:
    """FSDP2 frees a whole parameter by resizing its storage."""
    tensor = torch.arange(6.0)
    [path] = write_shards(tmp_path, [("a", tensor)], 10**6)
    tensor.untyped_storage().resize_(0)
    assert torch.equal(dict(mapped_tensors(path))["a"], torch.arange(6.0))
