"""The checkpoint that a command starts from, looked at before anything slow starts.

torch checks no checksum when it loads, but its files are zip archives, and every record of one has
its CRC-32. Files that cannot be read on this machine's disk are left to Lightning.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import torch

from copris_lightning.datamodules.continuity import Continuity
from copris_lightning.datamodules.steps import refuse_torn
from copris_lightning.errors import ConfigurationError
from copris_lightning.runs.resume import UNREADABLE, starting_point

_RECORDS = ("*.pt", "*.distcp")
_REST = "meta.pt"
"""Where Lightning puts what is not split, beside torch's distributed checkpoints."""
_FIT_KEYS = ("loops", "callbacks", "optimizer_states", "lr_schedulers")


def check_resumed(trainer: L.Trainer, data: L.LightningDataModule, run: Continuity | None) -> None:
    """Refuse a checkpoint that cannot be gone on from.

    Args:
        trainer: knows which one; there may be none.
        data: whose state is in it.
        run: what the state must fit, in ``fit``; other commands use the weights only.

    Raises:
        ConfigurationError: names the file and what is wrong.
    """
    path, weights_only = starting_point(trainer)
    if path is None or "://" in str(path):
        return
    check_file(Path(path))
    content = read(Path(path), weights_only)
    if content is None:
        return
    name = str(path)
    refuse_torn(content, name)
    with _reading(name):
        saved = _shapes(Path(path), content)
    _check_weights(name, saved, trainer.lightning_module)
    if run is None:
        return
    state = content.get(type(data).__qualname__)
    if not state:
        raise _refusal(name, f"it has no rollout of a {type(data).__qualname__}")
    sharded = Path(path).is_dir()
    lacking = [k for k in _FIT_KEYS if k not in content and not (sharded and k == _FIT_KEYS[2])]
    if lacking:
        raise _refusal(
            name,
            f"it holds weights only (no {', '.join(lacking)}): `fit` goes on from checkpoints that "
            "were saved with save_weights_only=false",
        )
    try:
        run.check(state, name)
    except (KeyError, TypeError, AttributeError) as error:
        raise _refusal(name, f"its rollout is not one of this version ({error!r})") from error


def check_file(path: Path) -> None:
    """Read a checkpoint once and compare its checksums.

    Raises:
        ConfigurationError: names the file, and what is wrong with it.
    """
    name = str(path)
    if not path.exists():
        raise _refusal(name, "there is no such file")
    if path.is_file():
        state = path.stat()
        _check_once(name, state.st_size, state.st_mtime_ns)
        return
    files = sorted(file for pattern in _RECORDS for file in path.rglob(pattern))
    if not files:
        raise _refusal(name, "it is a directory that holds no checkpoint")
    for part in files:
        with _reading(str(part)), part.open("rb") as file:
            if part.suffix == ".pt":
                _check_archive(str(part), file, part.stat().st_size)
    _check_shards(path)


@lru_cache(maxsize=4)
def _check_once(name: str, size: int, changed: int) -> None:
    """The command line and the run both ask, and files are large."""
    with _reading(name), open(name, "rb") as file:
        _check_archive(name, file, size)


class _reading:
    """Turns whatever a reader raises on foreign bytes into an error that names the file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigurationError) or not isinstance(error, UNREADABLE):
            return
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise _refusal(self._name, f"it cannot be read ({reason})") from error


def _check_archive(name: str, file: BinaryIO, size: int) -> None:
    if not size:
        raise _refusal(name, "it is empty")
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if file.read(4) == b"PK\x03\x04":
            raise _refusal(name, f"it is cut short, after {size} bytes")
        raise _refusal(name, "it is no checkpoint (those are zip archives, written by torch.save)")
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
        records = [Path(record).name for record in archive.namelist()]
    if broken is not None:
        raise _refusal(name, f"its bytes changed: the checksum of its record {broken!r} is wrong")
    if "data.pkl" not in records:
        raise _refusal(name, "it is no checkpoint, but another zip archive")


def _check_shards(path: Path) -> None:
    """Of torch's distributed checkpoints, whose files hold one archive after another."""
    index, rest = path / ".metadata", path / _REST
    if not index.exists() and not rest.exists():
        return  # DeepSpeed's
    for file in (index, rest):
        if not file.exists():
            raise _refusal(str(path), f"its {file.name} is missing")
    for item in _metadata(path).storage_data.values():
        part = path / item.relative_path
        with _reading(str(part)), part.open("rb") as file:
            file.seek(item.offset)
            content = file.read(item.length)
            _check_archive(str(part), io.BytesIO(content), len(content))


def _metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    with _reading(str(path / ".metadata")):
        return FileSystemReader(path).read_metadata()


def _shapes(path: Path, content: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of all weights in a checkpoint."""
    if path.is_file():
        return {name: tuple(tensor.shape) for name, tensor in content.get("state_dict", {}).items()}
    stored = _metadata(path).state_dict_metadata
    return {
        name.removeprefix("state_dict."): tuple(entry.size)
        for name, entry in stored.items()
        if name.startswith("state_dict.") and hasattr(entry, "size")
    }


def read(path: Path, weights_only: bool | None = None) -> dict[str, Any] | None:
    """What a checkpoint holds, its tensors left on the disk; ``None`` if only a strategy knows.

    Args:
        path: is checked already.
        weights_only: refuse all but tensors and plain values, which is the default.

    Raises:
        ConfigurationError: names the file, and what it is.
    """
    source = path
    if path.is_dir():
        source = path / _REST
        if not source.exists():
            return None
    name = str(path)
    safe = True if weights_only is None else weights_only
    try:
        with _reading(name):
            content = torch.load(source, map_location="cpu", mmap=True, weights_only=safe)
    except ConfigurationError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError) and safe:
            raise _refusal(
                name,
                "it holds more than tensors and plain values, so it is not one of this program; if "
                "a callback of yours saved such, and you trust the file, give weights_only=False",
            ) from error
        raise
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise _refusal(name, "it is no checkpoint of Lightning, but something else of torch")
    return content


def _check_weights(name: str, saved: dict[str, tuple[int, ...]], module: Any) -> None:
    """Compare names and shapes with the model's, which is not loaded for that."""
    if not saved:
        raise _refusal(name, "it has no weights")
    if not module.strict_loading:
        return
    expected = dict(module.expected_weights())
    ours = {weight: shape for weight, shape in saved.items() if weight.startswith("policy.")}
    source = f"model={module.model!r}"
    if module.lora is not None:
        source += " with lora"
    for weight, shape in expected.items():
        if weight in ours and ours[weight] != shape:
            raise _refusal(
                name,
                f"it is another model's: {weight} has the shape {list(ours[weight])} in it, and "
                f"{list(shape)} in {source}",
            )
    for one, other, verb in ((expected, ours, "lacks"), (ours, expected, "has")):
        odd = [weight for weight in one if weight not in other]
        if odd:
            more = f" and {len(odd) - 1} more" if odd[1:] else ""
            does = "has" if verb == "lacks" else "has not"
            raise _refusal(
                name, f"it is another model's: it {verb} {odd[0]}{more}, which {source} {does}"
            )


def _refusal(name: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"ckpt_path={name!r} cannot be gone on from: {reason}")
