"""What moves weights from the trainer's ranks to an engine, however it does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Begins a pass over the trainer's full tensors under the checkpoint's names, tied ones once. All
of the trainer's ranks have to go through a pass together."""

Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the engine's loop, from another thread, and waits for its result."""


class Transport(Protocol):
    """One rank's end of the way from the trainer's weights to the engine, which is held meanwhile.

    All ranks call the same methods together.
    """

    def send(self, weights: Weights) -> None:
        """Replace the engine's weights.

        At no moment more of the model than one shard (1 GB, or one tensor that is larger) stands
        in this process's host memory because of it, the kept set of files aside.

        Raises:
            WeightSyncError: on rank 0, the weights did not arrive.
        """
        ...

    def explain(self, weights: Weights) -> str:
        """Which of the weights the engine does not compute with, after a mismatch; empty on other
        ranks than 0."""
        ...

    def close(self) -> None:
        """Let go of what it keeps. May be called twice."""
        ...


class Receiver(Protocol):
    """An engine's end of the way; its coroutines run on the engine's loop, while it is held.

    A load that was begun and not ended, since something failed, is forgotten by the next one. Any
    method may raise :class:`~copris_lightning.errors.EngineError`.
    """

    async def begin_load(self) -> None:
        """Be ready for all of the model's weights, which come in shards."""
        ...

    async def load_shard(self, path: Path) -> None:
        """Load a safetensors file of full tensors under the checkpoint's names.

        It is complete, and may be overwritten once this returns.
        """
        ...

    async def end_load(self) -> None:
        """All shards were loaded.

        Raises:
            WeightSyncError: the engine does not compute with what they held.
        """
        ...

    async def load_adapter(self, folder: Path) -> None:
        """Apply the LoRA adapter in a folder of peft's layout in place of the last one.

        Raises:
            WeightSyncError: it does not apply what the folder holds.
        """
        ...

    async def explain(self, paths: Sequence[Path]) -> str:
        """Compare what the engine computes with to the trainer's weights as they are now.

        Args:
            paths: safetensors files that hold all of them.
        """
        ...
