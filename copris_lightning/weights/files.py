"""Weights on their way from the trainer to an engine's processes: a set of files, shard by shard.

The whole last set stays in the hand-over directory until the run ends, and the next send writes
over it. So an engine that died, also within a send, is given its weights again without the trainer:
:meth:`FilesTransport.restore`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from copris_lightning.directories import check_writable
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.weights.kept import SHARD_BYTES, KeptSet
from copris_lightning.weights.transport import Receiver, Run, Weights

KEY = "sync_directory"


def hand_over_prefix(directory: str | None) -> str:
    """How all paths begin that this process hands weights over through.

    Args:
        directory: where; ``None`` for shared memory if there is any, else temporary files.
    """
    shared = Path("/dev/shm")
    default = shared if shared.is_dir() else Path(tempfile.gettempdir())
    return str((Path(directory).absolute() if directory else default) / f"copris-{os.getpid()}-")


def check_hand_over(directory: str | None, model: str = "") -> None:
    """Refuse a directory that weights cannot be handed over through.

    Args:
        directory: as for :func:`hand_over_prefix`; it has to be there, since others see it too.
        model: a checkpoint whose weights must fit there, if it is a folder.

    Raises:
        ConfigurationError: names it.
    """
    parent = Path(hand_over_prefix(directory)).parent
    setting = KEY if directory is None else f"{KEY}={directory!r}"
    check_writable(parent, setting, create=False)
    # The trainer may hold them in a wider precision than the checkpoint: this much at least.
    needed = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if model else 0
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ConfigurationError(
            f"{setting}: {parent} has room for {free / 1e9:.1f} GB, and a set of weights takes "
            f"{needed / 1e9:.1f} GB; give another directory"
        )


class FilesTransport:
    """Weights through files that the engine's processes see. See :class:`Transport`.

    Args:
        receiver: the engine; it is called on rank 0 only.
        directory: as for :func:`hand_over_prefix`.
        rank: of this process in the trainer.
        run: on rank 0, reaches the engine's loop.
        shard_bytes: no shard of more than one tensor is larger.
    """

    def __init__(
        self,
        receiver: Receiver,
        directory: str | None,
        rank: int,
        run: Run,
        *,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self._receiver = receiver
        self._rank = rank
        self._run = run
        self._kept = KeptSet(hand_over_prefix(directory), shard_bytes)

    def send(self, weights: Weights) -> None:
        """Write over the kept set, and have the engine load each shard as soon as it is there.

        If the engine fails, the set is finished before this raises; the pass over the weights is,
        whatever fails.

        Raises:
            WeightSyncError: on rank 0, the engine did not take them, or they could not be written.
        """
        delivery = _Delivery(self._receiver, self._run)
        self._write(weights, delivery.take)
        delivery.end()

    def keep(self, weights: Weights) -> None:
        """Write over the kept set only, for an engine that is sent them in another way.

        Raises:
            WeightSyncError: on rank 0, they could not be written.
        """
        self._write(weights, lambda path: None)

    def restore(self) -> None:
        """Give the kept set to an engine that has booted again.

        Raises:
            WeightSyncError: there is no finished set, or the engine did not take it.
        """
        if self._rank != 0:
            return
        delivery = _Delivery(self._receiver, self._run)
        for path in self._kept.paths():
            delivery.take(path)
        delivery.end()

    def explain(self, weights: Weights) -> str:
        """Write the weights over the kept set, and have the engine compare. See
        :class:`Transport`."""
        self.keep(weights)
        if self._rank != 0:
            return ""
        paths = self._kept.paths()
        if any(path.is_dir() for path in paths):
            return (
                "the engine applies the adapter that was sent; its other weights were not "
                "compared, and it may compute in another dtype than the trainer"
            )
        return str(self._run(self._receiver.explain(paths)))

    def close(self) -> None:
        """Remove the kept set. May be called twice."""
        self._kept.remove()

    def _write(self, weights: Weights, then: Callable[[Path], None]) -> None:
        if self._rank == 0:
            self._kept.write(weights, then)
            return
        for _ in weights():  # what is split over ranks is put together on all of them
            pass


class _Delivery:
    """Files on their way into the engine. The first failure ends it, and is kept until the end."""

    def __init__(self, receiver: Receiver, run: Run) -> None:
        self._receiver = receiver
        self._run = run
        self._failure: BaseException | None = None
        self._has_begun = False

    def take(self, path: Path) -> None:
        """Have the engine load a shard, or an adapter's folder."""
        if path.is_dir():
            self._step(self._receiver.load_adapter, path)
            return
        if not self._has_begun:
            self._has_begun = True
            self._step(self._receiver.begin_load)
        self._step(self._receiver.load_shard, path)

    def end(self) -> None:
        """All were taken.

        Raises:
            WeightSyncError: the engine failed at one, or they did not arrive.
        """
        if self._has_begun:
            self._step(self._receiver.end_load)
        if isinstance(self._failure, EngineError) and not isinstance(
            self._failure, WeightSyncError
        ):
            raise WeightSyncError(
                f"the engine did not take the weights: {self._failure}"
            ) from self._failure
        if self._failure is not None:
            raise self._failure

    def _step(self, method: Callable[..., Coroutine[Any, Any, None]], *args: Path) -> None:
        if self._failure is not None:
            return
        try:
            self._run(method(*args))
        except BaseException as error:  # noqa: BLE001 - also a signal to stop waits for the set
            self._failure = error
