"""The last weights that were sent, kept in files, and written over one file at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from weakref import finalize

from safetensors.torch import save_file
from torch import Tensor

from copris_lightning.errors import WeightSyncError
from copris_lightning.weights.adapter import adapter_shape, as_folder, is_adapter
from copris_lightning.weights.shard_file import write_shards
from copris_lightning.weights.transport import Weights

SHARD_BYTES = 10**9
"""No shard of more than one tensor is larger."""


class KeptSet:
    """The weights of the last send, in safetensors files of a folder of its own.

    ``manifest.json`` there says which send they are of (``send``, counted from 1), whether all of
    them are there (``is_complete``) and the names of the files, or of an adapter's folder, in order
    (``files``).

    Args:
        prefix: how the folder's path begins.
        shard_bytes: no file of more than one tensor is larger.
    """

    def __init__(self, prefix: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._folder: Path | None = None
        self._removal: Callable[[], object] = bool
        self._sends = 0

    def write(self, weights: Weights, then: Callable[[Path], None]) -> None:
        """Replace the set. The pass over the weights is gone through to its end whatever happens,
        since other ranks go through it too.

        Args:
            weights: what to write; an adapter goes into one file, in a folder of peft's layout.
            then: called with each file, or the adapter's folder, as soon as it is there.

        Raises:
            WeightSyncError: it could not be written; it stays incomplete.
        """
        passing = weights()
        try:
            folder = self._own_folder()
            self._sends += 1
            self._note(folder, [], is_complete=False)
            files = []
            for path in self._written(folder, passing):
                files.append(path.name)
                then(path)
            for left in folder.glob("shard-*"):
                if left.name not in files:
                    left.unlink()
            self._note(folder, files, is_complete=True)
        except OSError as error:
            raise WeightSyncError(f"the weights could not be written: {error}") from error
        finally:
            for _ in passing:
                pass

    def paths(self) -> list[Path]:
        """The files of a finished set, or an adapter's folder, in the order of writing.

        Raises:
            WeightSyncError: nothing was written yet, or not to the end.
        """
        if self._folder is not None:
            manifest = json.loads((self._folder / "manifest.json").read_text())
            if manifest["is_complete"]:
                return [self._folder / name for name in manifest["files"]]
        raise WeightSyncError("no finished set of weights is kept; they have to be sent again")

    def remove(self) -> None:
        """Remove the files, which also happens when Python ends. May be called twice."""
        self._folder = None
        self._removal()

    def _own_folder(self) -> Path:
        if self._folder is None:
            parent, prefix = os.path.split(self._prefix)
            folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
            self._removal = finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._folder = Path(folder)
        return self._folder

    def _written(self, folder: Path, passing: Iterator[tuple[str, Tensor]]) -> Iterator[Path]:
        """Writes one file after the other, each over the last set's."""
        first = list(islice(passing, 1))
        tensors = chain(first, passing)
        if not first or not is_adapter(first[0][0]):
            yield from write_shards(folder, tensors, self._shard_bytes)
            return
        adapter = {name: tensor.detach().cpu().clone() for name, tensor in tensors}
        shape = adapter_shape(adapter)
        assert shape is not None
        new = folder / "adapter" / "next.safetensors"
        new.parent.mkdir(exist_ok=True)
        save_file(adapter, new)
        yield as_folder(new, shape)

    def _note(self, folder: Path, files: list[str], *, is_complete: bool) -> None:
        manifest = {"send": self._sends, "is_complete": is_complete, "files": files}
        (folder / "next.json").write_text(json.dumps(manifest))
        (folder / "next.json").rename(folder / "manifest.json")
