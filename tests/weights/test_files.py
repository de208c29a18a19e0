"""Weights go shard by shard, each tensor once; the last set can be had again, whoever died."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from receivers import ListeningReceiver, SomeWeights
from safetensors.torch import load_file

from copris_lightning.errors import ConfigurationError, WeightSyncError
from copris_lightning.weights.files import FilesTransport, check_hand_over
from copris_lightning.weights.gather import full_weights

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=12)
some = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def transport(
    receiver: ListeningReceiver, directory: Path, limit: int = 10**9, rank: int = 0
) -> FilesTransport:
    return FilesTransport(receiver, str(directory), rank, asyncio.run, shard_bytes=limit)


def folder(directory: Path) -> Path:
    (found,) = directory.glob(f"copris-{os.getpid()}-*")
    return found


def manifest(directory: Path) -> dict[str, object]:
    return json.loads((folder(directory) / "manifest.json").read_text())


def kept(directory: Path) -> list[dict[str, torch.Tensor]]:
    files = sorted(folder(directory).glob("*.safetensors"))
    assert [file.name for file in files] == manifest(directory)["files"]
    return [load_file(file) for file in files]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for left in tmp_path.glob("copris-*"):
        shutil.rmtree(left, ignore_errors=True)  # a collected one removes its own


@some
@given(sends=st.lists(SIZES, min_size=1, max_size=3), limit=st.integers(1, 80))
def test_every_tensor_is_delivered_once_in_order_and_stays_on_disk(
    tmp_path_factory: pytest.TempPathFactory, sends: Sequence[list[int]], limit: int
) -> None:
    directory = tmp_path_factory.mktemp("hand_over")
    receiver = ListeningReceiver()
    way = transport(receiver, directory, limit)
    for number, sizes in enumerate(sends):
        weights = SomeWeights(sizes, value=100.0 * number)
        way.send(weights)
        assert receiver.is_loaded
        assert weights.are(receiver.shards)
        assert weights.are(kept(directory))
        assert manifest(directory)["send"] == number + 1
        assert manifest(directory)["is_complete"]
        bytes_of = [[shard[n].nbytes for n in sorted(shard)] for shard in receiver.shards]
        assert all(sum(each) <= limit or len(each) == 1 for each in bytes_of)
        # No shard could have taken in the next one's first tensor, which would not be aligned.
        for (each, after), (_, shard) in zip(
            pairwise(bytes_of), pairwise(receiver.shards), strict=True
        ):
            aligned = sum(each) % shard[min(shard)].element_size() == 0
            assert not aligned or sum(each) + after[0] > limit
    way.close()
    way.close()
    assert list(directory.iterdir()) == []


@some
@given(sizes=SIZES, limit=st.integers(1, 80), data=st.data())
def test_a_set_is_finished_whichever_shard_the_engine_dies_at(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("hand_over")
    receiver = ListeningReceiver()
    way = transport(receiver, directory, limit)
    way.send(SomeWeights(sizes, value=-7.0))
    receiver.dies_at = data.draw(st.integers(0, len(receiver.shards) - 1))
    weights = SomeWeights(sizes)
    with pytest.raises(WeightSyncError, match="did not take the weights: the engine died"):
        way.send(weights)
    assert weights.passes == 1  # other ranks' too
    assert weights.are(kept(directory))
    assert manifest(directory) | {"files": 0} == {"send": 2, "is_complete": True, "files": 0}
    # It is not asked for anything more once it is dead; the next one gets all.
    assert receiver.calls[-1] != "end"
    receiver.dies_at = None
    way.restore()
    assert receiver.is_loaded
    assert weights.are(receiver.shards)
    assert weights.seen == len(sizes)  # without the trainer
    way.close()


def test_tied_weights_are_sent_once(directory: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3, 2), "head": torch.nn.Linear(2, 3)})
    model["head"].weight = model["embed"].weight
    receiver = ListeningReceiver()
    transport(receiver, directory, 1).send(lambda: full_weights(model, model))
    assert [list(shard) for shard in receiver.shards] == [["embed.weight"], ["head.bias"]]


def test_a_signal_to_stop_waits_for_the_set(directory: Path) -> None:
    receiver = ListeningReceiver(dies_at=0)
    receiver.error = KeyboardInterrupt()
    weights = SomeWeights([3, 4])
    with pytest.raises(KeyboardInterrupt):
        transport(receiver, directory, 1).send(weights)
    assert weights.are(kept(directory))


def test_what_an_engine_says_of_a_load_is_what_is_raised(directory: Path) -> None:
    receiver = ListeningReceiver(dies_at=1)
    receiver.error = WeightSyncError("it has no place for the trainer's w001")
    with pytest.raises(WeightSyncError, match=r"^it has no place"):
        transport(receiver, directory, 1).send(SomeWeights([3, 4]))


def test_other_ranks_go_through_the_weights_and_write_nothing(directory: Path) -> None:
    receiver = ListeningReceiver()
    way = transport(receiver, directory, rank=1)
    weights = SomeWeights([3, 4])
    way.send(weights)
    assert way.explain(weights) == ""
    way.restore()
    way.close()
    assert (weights.passes, receiver.calls, list(directory.iterdir())) == (2, [], [])


def test_what_cannot_be_written_is_an_error_after_the_pass(directory: Path) -> None:
    receiver = ListeningReceiver()
    way = transport(receiver, directory, 1)
    way.send(SomeWeights([3, 4]))
    folder(directory).joinpath("shard-00001.safetensors").unlink()
    folder(directory).joinpath("shard-00001.safetensors").mkdir()
    weights = SomeWeights([5, 6, 7])
    with pytest.raises(WeightSyncError, match=r"could not be written: .*shard-00001"):
        way.send(weights)
    assert (weights.passes, weights.seen) == (1, 3)
    assert not manifest(directory)["is_complete"]
    with pytest.raises(WeightSyncError, match="no finished set"):
        way.restore()


def test_nothing_can_be_restored_before_the_first_send(directory: Path) -> None:
    with pytest.raises(WeightSyncError, match="no finished set"):
        transport(ListeningReceiver(), directory).restore()


def test_the_engine_compares_with_all_files_of_a_new_set(directory: Path) -> None:
    way = transport(ListeningReceiver(), directory, 1)
    way.send(SomeWeights([3, 4]))
    assert way.explain(SomeWeights([3, 4, 5])) == "w000 w001 w002"


def test_an_adapter_comes_in_one_file_of_a_folder_and_again(directory: Path) -> None:
    def adapter(value: float) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in ("q_proj", "o_proj"):
            yield f"base.{layer}.lora_A.weight", torch.full((2, 9), value)
            yield f"base.{layer}.lora_B.weight", torch.full((9, 2), value)

    receiver = ListeningReceiver()
    way = transport(receiver, directory, 1)
    for value in (1.0, 2.0):
        way.send(lambda value=value: adapter(value))
        (path,) = {*receiver.adapters}
        tensors = load_file(path / "adapter_model.safetensors")
        assert {name: float(tensor[0, 0]) for name, tensor in tensors.items()} == dict.fromkeys(
            [name for name, _ in adapter(value)], value
        )
        config = json.loads((path / "adapter_config.json").read_text())
        assert (config["r"], config["target_modules"]) == (2, ["o_proj", "q_proj"])
        assert sorted(file.name for file in path.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    way.restore()
    assert receiver.calls == ["adapter"] * 3
    assert "other weights were not compared" in way.explain(lambda: adapter(3.0))


def test_a_directory_without_room_for_a_set_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**12)  # of holes
    check_hand_over(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"sync_directory=.* takes 1000\.0 GB"):
        check_hand_over(str(tmp_path), str(tmp_path))


MEMORY = """
import asyncio, sys, torch
from receivers import ListeningReceiver
from copris_lightning.weights.files import FilesTransport

class Receiver(ListeningReceiver):
    async def load_shard(self, path):
        self.calls.append(path.name)

def peak():
    # Not getrusage: that begins with what its parent had when it was forked.
    with open("/proc/self/status") as status:
        [line] = (line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

MB = 2**20
model = [torch.ones(16 * MB // 4) for _ in range(32)]
weights = lambda: ((f"w{i:02}", t) for i, t in enumerate(model))
receiver = Receiver()
way = FilesTransport(receiver, sys.argv[1], 0, asyncio.run, shard_bytes=64 * MB)
FilesTransport(receiver, sys.argv[1], 0, asyncio.run).send(lambda: iter([("w", torch.ones(1))]))
before = peak()
for _ in range(2):
    way.send(weights)
print((peak() - before) / MB, len(receiver.calls))
"""


def test_a_send_takes_no_host_memory(directory: Path) -> None:
    """512 MB in shards of 64 MB, on disk: what memory holds besides the model."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(directory)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    megabytes, calls = done.stdout.split()
    assert list(directory.iterdir()) == []  # removed when Python ends
    assert int(calls) == 3 + 2 * (1 + 8 + 1)
    assert float(megabytes) < 16
