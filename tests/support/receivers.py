"""An engine's end of the way of weights, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from copris_lightning.errors import EngineError


class ListeningReceiver:
    """Keeps what it is given; dies when it is given shard number ``dies_at``.

    Attributes:
        shards: of the load that was begun last, in order.
        is_loaded: whether that was ended.
        adapters: the folders that came.
        error: what it dies with.
    """

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.error: BaseException = EngineError("the engine died")
        self.shards: list[dict[str, torch.Tensor]] = []
        self.is_loaded = False
        self.adapters: list[Path] = []
        self.calls: list[str] = []

    async def begin_load(self) -> None:
        self.calls.append("begin")
        self.shards, self.is_loaded = [], False

    async def load_shard(self, path: Path) -> None:
        self.calls.append(path.name)
        if len(self.shards) == self.dies_at:
            raise self.error
        self.shards.append(load_file(path))

    async def end_load(self) -> None:
        self.calls.append("end")
        self.is_loaded = True

    async def load_adapter(self, folder: Path) -> None:
        self.calls.append("adapter")
        self.adapters.append(folder)

    async def explain(self, paths: Sequence[Path]) -> str:
        return " ".join(name for path in paths for name in load_file(path))


class SomeWeights:
    """Tensors by name, which are gone when the next one is asked for, as split ones are.

    Every third is in bfloat16.

    Args:
        sizes: of each, in elements.
        value: of the first tensor's elements; the next ones' are one more each.

    Attributes:
        seen: how many tensors were asked for, over all passes.
        passes: how many passes were gone through to their end.
    """

    def __init__(self, sizes: Sequence[int], value: float = 0.0) -> None:
        self.sizes = sizes
        self.value = value
        self.seen = 0
        self.passes = 0

    def __call__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i, size in enumerate(self.sizes):
            tensor = self._tensor(i, size)
            self.seen += 1
            yield f"w{i:03d}", tensor
            tensor.fill_(torch.nan)
        self.passes += 1

    def are(self, shards: Sequence[dict[str, torch.Tensor]]) -> bool:
        """Whether shards hold each tensor once, in order, as it was."""
        names = [name for shard in shards for name in sorted(shard)]
        tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
        return names == [f"w{i:03d}" for i in range(len(self.sizes))] and all(
            torch.equal(tensors[name], self._tensor(i, size))
            for i, (name, size) in enumerate(zip(names, self.sizes, strict=True))
        )

    def _tensor(self, i: int, size: int) -> torch.Tensor:
        dtype = torch.bfloat16 if i % 3 == 1 else torch.float32
        return torch.full((size,), self.value + i, dtype=dtype)
