"""What moves weights from the trainer's ranks to an engine, however it does."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from torch import Tensor

Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Begins a pass over the trainer's full tensors under the checkpoint's names, tied ones once. All
of the trainer's ranks have to go through a pass together."""

Run = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the engine's loop, from another thread, and waits for its result."""
