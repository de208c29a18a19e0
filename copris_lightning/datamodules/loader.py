"""What Lightning takes for a data loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from copris_lightning.datamodules.sealed import Sealed


class SizedStream:
    """A loader over an iterator, with a length.

    Lightning prefetches from loaders without one, and the next rollout would start before this
    step's weight sync.
    """

    def __init__(self, length: int, iterate: Callable[[], Iterator[Any]]) -> None:
        self._length = length
        self._iterate = iterate

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sealed]:
        return map(Sealed, self._iterate())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module saves where it is. Without it Lightning warns at each resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do."""
