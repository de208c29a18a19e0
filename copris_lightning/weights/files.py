"""Weights on their way from the trainer to an engine's processes: a file for the time it takes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from copris_lightning.directories import check_writable

KEY = "sync_directory"


def hand_over_prefix(directory: str | None) -> str:
    """How all paths begin that this process hands weights over through.

    Args:
        directory: where; ``None`` for shared memory if there is any, else temporary files.
    """
    shared = Path("/dev/shm")
    default = shared if shared.is_dir() else Path(tempfile.gettempdir())
    return str((Path(directory).absolute() if directory else default) / f"copris-{os.getpid()}-")


def check_hand_over(directory: str | None) -> None:
    """Refuse a directory that weights cannot be handed over through.

    Args:
        directory: as for :func:`hand_over_prefix`; it has to be there, since others see it too.

    Raises:
        ConfigurationError: names it.
    """
    parent = Path(hand_over_prefix(directory)).parent
    check_writable(parent, KEY if directory is None else f"{KEY}={directory!r}", create=False)


@contextmanager
def handed_over(weights: Iterable[tuple[str, Tensor]], directory: str | None) -> Iterator[Path]:
    """A safetensors file that lives as long as the block.

    Args:
        weights: names and tensors, on any device.
        directory: as for :func:`hand_over_prefix`.
    """
    parent, prefix = os.path.split(hand_over_prefix(directory))
    own = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        path = own / "model.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in weights}, path)
        yield path
    finally:
        shutil.rmtree(own, ignore_errors=True)
