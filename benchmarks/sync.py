"""How long a weight sync takes, and how much memory, against a copy of the same bytes.

    python benchmarks/sync.py [--sizes 1M 10M 100M 300M] [--largest]

A model of each size is booted in vLLM, and gets new weights through files while it is held, as
after every batch. By turns with that, the same tensors are copied once within this process. The
target is 60 ms and three such copies; where the time goes is printed beside it. Memory is what this
process and the engine's take during a sync beyond what they had before, and what the files that are
handed over grow to, in a sync that is not timed.

A size takes five times its weights: the trainer's, the engine's, the files', the copy and the
checkpoint that it boots from. ``--largest`` adds one billion parameters in bfloat16, for which
nothing else may run on a machine of 24 GiB.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import Report, Table, by_turns, parse, parser, picked
from models import parameters, quiet, qwen3, save
from torch import Tensor

from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.rollout.loop_thread import LoopThread
from copris_lightning.weights.export import as_saved
from copris_lightning.weights.kept import SHARD_BYTES

SIZES = {
    "1M": {"hidden_size": 128, "layers": 4, "vocab": 2048, "head_dim": 32},
    "10M": {"hidden_size": 256, "layers": 10, "vocab": 8192},
    "100M": {"hidden_size": 768, "layers": 12},
    "300M": {"hidden_size": 1024, "layers": 22, "vocab": 16_384},
    "1B": {"hidden_size": 2048, "layers": 18, "vocab": 32_768},
}
CONTEXT = 256
ALLOWED_S = 0.06
STEPS = ("hold", "begin_load", "load_shard", "end_load", "release")


class Timed(VLLMEngine):
    """Adds up how long each step of a sync takes it."""

    seconds: dict[str, float]

    async def _timed(self, step: str, work: Coroutine[Any, Any, None]) -> None:
        started = time.perf_counter()
        await work
        self.seconds[step] += time.perf_counter() - started

    async def hold(self, *, keep: bool = False) -> None:
        await self._timed("hold", super().hold(keep=keep))

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        await self._timed("release", super().release(version, clear_kv=clear_kv))

    async def begin_load(self) -> None:
        await self._timed("begin_load", super().begin_load())

    async def load_shard(self, path: Path) -> None:
        await self._timed("load_shard", super().load_shard(path))

    async def end_load(self) -> None:
        await self._timed("end_load", super().end_load())


class Synced:
    """A booted engine and the weights that it is given.

    Args:
        size: of :data:`SIZES`.
        dtype: of the trainer's and the engine's weights, by torch's name.
        folder: for the checkpoint.
        shared: for the files that are handed over.
    """

    def __init__(self, size: str, dtype: str, folder: str, shared: str) -> None:
        model = qwen3(**SIZES[size], context=CONTEXT).to(getattr(torch, dtype))
        self.parameters = parameters(model)
        named = {name: tensor.detach() for name, tensor in model.named_parameters()}
        self.weights: dict[str, Tensor] = dict(as_saved(model, named.items()))
        self.bytes = sum(tensor.nbytes for tensor in self.weights.values())
        arguments = {"dtype": dtype, "enforce_eager": True, "kv_cache_memory_bytes": 2**27}
        self.engine = Timed(arguments, sync_directory=shared)
        self.engine.seconds = defaultdict(float)
        self.files = Path(shared)
        self._copies = [torch.zeros_like(tensor) for tensor in self.weights.values()]
        self._loop = LoopThread(self.engine.new_event_loop)
        spec = EngineSpec(save(model, folder), 8, CONTEXT, vocab_size=98)
        try:
            self._loop.call(self.engine.start(spec))
        except BaseException:
            self._loop.close()
            raise
        self._transport = self.engine.transport(0, self._loop.call)

    def sync(self) -> dict[str, float]:
        """Seconds of all of it, and of each of its steps."""
        for tensor in self.weights.values():
            tensor.mul_(1 + 1e-3)

        def weights() -> Iterator[tuple[str, Tensor]]:
            yield from self.weights.items()

        self.engine.seconds.clear()
        started = time.perf_counter()
        self._loop.call(self.engine.hold())
        self._transport.send(weights)
        self._loop.call(self.engine.release(self.engine.version + 1))
        whole = time.perf_counter() - started
        steps = {step: self.engine.seconds[step] for step in STEPS}
        return {"seconds": whole, **steps, "write": whole - sum(steps.values())}

    def copy(self) -> dict[str, float]:
        """Seconds of copying all weights to memory that is there already."""
        started = time.perf_counter()
        for copy, tensor in zip(self._copies, self.weights.values(), strict=True):
            copy.copy_(tensor)
        return {"seconds": time.perf_counter() - started}

    def close(self) -> None:
        """End the engine."""
        self._transport.close()
        self._loop.call(self.engine.close())
        self._loop.close()


class Peak:
    """The most memory that is taken within the block, in bytes beyond what was taken before it.

    Attributes:
        memory: by this process and those it started, without what they share or map from files.
        files: in the folder, in all.
    """

    def __init__(self, folder: Path) -> None:
        self.memory = self.files = 0
        self._folder = folder
        me = psutil.Process()
        self._statuses = [
            Path(f"/proc/{process.pid}/status") for process in (me, *me.children(recursive=True))
        ]
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self._before = self._anonymous()
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.memory = max(self.memory, self._anonymous() - self._before)
            self.files = max(self.files, _size(self._folder))

    def _anonymous(self) -> int:
        lines = (line for path in self._statuses for line in path.read_text().splitlines())
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def measure(size: str, dtype: str, report: Report, options: argparse.Namespace) -> None:
    """One size."""
    shared_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=shared_memory) as shared,
    ):
        synced = Synced(size, dtype, folder, shared)
        try:
            variants = {"sync": synced.sync, "copy": synced.copy}
            turns = by_turns(variants, options.rounds, warm_up=2)
            with Peak(synced.files) as peak:
                synced.sync()
        finally:
            synced.close()
    name = f"{synced.parameters / 1e6:,.1f} M parameters, {dtype}, {synced.bytes / 1e6:,.0f} MB"
    seconds = picked(turns, "seconds")
    report.add(Table(f"{name}: seconds", seconds, ("copy",), higher_is_better=False))
    beyond = [
        max(0.0, sync - ALLOWED_S) / copy
        for sync, copy in zip(seconds["sync"], seconds["copy"], strict=True)
    ]
    copies = {f"copies beyond {1e3 * ALLOWED_S:.0f} ms": beyond}
    report.add(Table(f"{name}: target 3", copies, higher_is_better=False))
    steps = {step: [turn[step] for turn in turns["sync"]] for step in (*STEPS, "write")}
    report.add(Table(f"{name}: seconds of each step", steps, higher_is_better=False))
    shard = min(SHARD_BYTES, synced.bytes)
    taken = {
        "memory, in shards": [peak.memory / shard],
        "files, in weights": [peak.files / synced.bytes],
    }
    report.add(Table(f"{name}: peak", taken, higher_is_better=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES)[:-1])
    line.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    line.add_argument("--largest", action="store_true", help="also 1B, in bfloat16")
    options = parse(line, arguments, {"sizes": ["1M"]})
    quiet()
    report = Report("sync", options)
    for size in options.sizes:
        measure(size, options.dtype, report, options)
    if options.largest:
        measure("1B", "bfloat16", report, options)
    report.write()


if __name__ == "__main__":
    main()
