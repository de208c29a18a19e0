"""What moves weights from the trainer's ranks to an engine, however it does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
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
