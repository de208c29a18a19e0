"""What a run goes on from: nothing, unless it was told to."""

from __future__ import annotations

import functools
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from copris_lightning.errors import ConfigurationError
from copris_lightning.runs.directory import (
    RECORD,
    Place,
    checkpoint_directories,
    decide,
    directory_of,
    place_of,
)
from copris_lightning.trainer_parts import callbacks, datamodule

_LIGHTNINGS = ("best", "hpc")
"""Values of ``ckpt_path`` that are left to Lightning, as are those with a scheme."""

UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, ImportError, NotImplementedError, AssertionError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)
"""What torch's and Python's readers raise on bytes that nobody wrote for them."""

_starts: WeakKeyDictionary[L.Trainer, tuple[Any, bool | None]] = WeakKeyDictionary()
"""What running commands go on from, and their ``weights_only``."""

_CHOSEN = "COPRIS_CKPT_PATH"
"""Tells the ranks that Lightning starts what this one goes on from; empty for nothing."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a checkpoint without loading its tensors.

    Attributes:
        step: optimizer steps; ``None`` if it could not be read.
        epochs: epochs that were ended.
        run: the directory of its run.
    """

    step: int | None
    epochs: int | None
    run: Path | None


class NothingToTrain(ConfigurationError):
    """The checkpoint is where the run was to end."""


def begin(trainer: L.Trainer, command: str, asked: str | Path | None) -> str | None:
    """Before a command runs, and before Lightning starts other ranks: see :func:`resolve`."""
    if not trainer.is_global_zero and _CHOSEN in os.environ:
        return os.environ[_CHOSEN] or None
    if asked == "best":
        raise ConfigurationError(
            "--ckpt_path=best is what a run has saved before in the same program, and this one has "
            "not begun; give a path, or last for the newest checkpoint"
        )
    found = resolve(trainer, command, asked)
    os.environ[_CHOSEN] = found or ""
    if not _is_lightnings(found):
        _decide(trainer, command, found)
    return found


def attach(trainer: Any) -> None:
    """Have ``fit`` and the others of this trainer choose what they go on from as described here."""
    connector = trainer._checkpoint_connector
    if isinstance(connector._select_ckpt_path, functools.partial):
        return
    connector._select_ckpt_path = functools.partial(_select, trainer, connector._select_ckpt_path)
    trainer._run = functools.partial(_run, trainer, trainer._run)
    for callback in callbacks(trainer):
        if isinstance(callback, OnExceptionCheckpoint):
            _guard(callback)


def _select(
    trainer: Any,
    lightnings: Callable[..., Any],
    state_fn: Any,
    ckpt_path: Any,
    model_provided: bool,
    model_connected: bool,
) -> Any:
    """In the place of Lightning's own choice, on every rank, before loggers and engine start.

    Given no path, Lightning would go on from an ``OnExceptionCheckpoint``'s file, or from a SLURM
    job's in the same directory, also where the run is meant as a new one.
    """
    is_lightnings = trainer._checkpoint_connector._user_managed or _is_lightnings(ckpt_path)
    if is_lightnings or (ckpt_path is None and not model_provided):
        given = {"model_provided": model_provided, "model_connected": model_connected}
        found = lightnings(state_fn, ckpt_path, **given)
    else:
        found = resolve(trainer, state_fn.value, ckpt_path)
    _decide(trainer, state_fn.value, found)
    return found


def _run(
    trainer: L.Trainer,
    lightnings: Callable[..., Any],
    model: Any,
    ckpt_path: Any = None,
    weights_only: bool | None = None,
) -> Any:
    """Lightning's own, which puts the path on the trainer only when it loads the file, after all
    is set up, and ``weights_only`` nowhere."""
    _starts[trainer] = ckpt_path, weights_only
    return lightnings(model, ckpt_path=ckpt_path, weights_only=weights_only)


def starting_point(trainer: L.Trainer) -> tuple[Any, bool | None]:
    """The running command's checkpoint, or ``None``; and its ``weights_only``."""
    return _starts.get(trainer, (None, None))


def _decide(trainer: L.Trainer, command: str, found: str | Path | None) -> None:
    """An evaluation has a directory of its own, whatever it loads."""
    run = None
    if found is not None and command == "fit" and not _is_lightnings(found):
        run = read(Path(found)).run
    decide(trainer, command, None if found is None else Path(found), run)


def resolve(trainer: L.Trainer, command: str, asked: str | Path | None) -> str | None:
    """The path that ``ckpt_path`` means.

    Args:
        trainer: about to run.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        asked: a path; ``last``, the newest checkpoint of the newest run under this name; ``auto``,
            the same if there is one; or ``None``: nothing, but for a job that SLURM requeued.

    Raises:
        ConfigurationError: there is none.
        NothingToTrain: it is at or past the end that the trainer is given.
    """
    if asked is None:
        path = _requeued(trainer) if command == "fit" else None
    elif asked in ("last", "auto"):
        path = _newest(trainer, must_exist=asked == "last")
    elif _is_lightnings(asked):
        return str(asked)
    else:
        path = Path(asked)
        if not path.exists():
            raise ConfigurationError(f"--ckpt_path={asked}: there is no such checkpoint")
    if path is None:
        return None
    facts = read(path)
    if command == "fit":
        _check_unfinished(trainer, path, facts)
    if str(path) != str(asked):
        _say(trainer, f"checkpoint: {path}" + (f" (step {facts.step})" if facts.step else ""))
    return str(path)


def read(path: Path) -> Facts:
    """Look into a checkpoint; what is wrong with one is said by who loads it."""
    file = path
    if path.is_dir():  # in parts: FSDP's and DeepSpeed's
        parts = [path / "meta.pt", *sorted(path.glob("checkpoint/*model_states.pt"))]
        file = next((part for part in parts if part.is_file()), path)
    try:
        state = file.stat()
        step, epochs, recorded = _read_once(file, state.st_size, state.st_mtime_ns)
    except UNREADABLE:
        return Facts(None, None, _run_of(path, None))
    return Facts(step, epochs, _run_of(path, recorded))


@functools.lru_cache(maxsize=4)
def _read_once(file: Path, size: int, changed: int) -> tuple[Any, Any, Path | None]:
    """Steps, epochs and run of a file, which is asked for several times in a start."""
    state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    recorded = Path(state[RECORD]) if RECORD in state else None
    loops = state.get("loops", {}).get("fit_loop", {})
    epochs = loops.get("epoch_progress", {}).get("current", {}).get("processed")
    return state.get("global_step"), epochs, recorded


def _run_of(checkpoint: Path, recorded: Path | None) -> Path | None:
    """The directory of a checkpoint's run: around it, which is right also where all was moved, or
    as it says itself."""
    folder = Path(os.path.abspath(checkpoint)).parent
    around = folder.parent if folder.name == "checkpoints" else None
    if around is not None and re.fullmatch(r"version_\d+", around.name):
        return around
    if recorded is not None and recorded.is_dir():
        return recorded
    if around is not None and around.name == (recorded.name if recorded else None):
        return around
    return None


def _newest(trainer: L.Trainer, *, must_exist: bool) -> Path | None:
    """The newest checkpoint of the newest run that has one."""
    place, elsewhere = place_of(trainer), _elsewhere(trainer)
    by_run: dict[Path | None, list[Path]] = {
        run: _checkpoints(run / "checkpoints", "**/*.ckpt") for run in place.runs()
    }
    unknown: list[Path] = []
    for folder, patterns in elsewhere:
        for path in (p for pattern in patterns for p in _checkpoints(folder, pattern)):
            run = read(path).run
            if run is None:
                unknown.append(path)
            elif _is_in(run, place):
                by_run.setdefault(run, []).append(path)
    by_run[None] = unknown
    for run, found in by_run.items():
        if found:
            return max(found, key=_age)
        if run is not None:
            _say(trainer, f"no checkpoint in {run}")
    looked = [str((place.fixed or place.parent / "version_*") / "checkpoints")]
    looked += [str(folder / pattern) for folder, patterns in elsewhere for pattern in patterns]
    where = f"no checkpoint in {', '.join(looked)}"
    if must_exist:
        raise ConfigurationError(
            f"--ckpt_path=last: {where}; give a path, leave it out to start a new run, or say auto "
            "to start one where there is none"
        )
    _say(trainer, f"{where}: starting afresh")
    return None


def _elsewhere(trainer: L.Trainer) -> list[tuple[Path, list[str]]]:
    """Directories outside the runs' own that the trainer's checkpoints go to, and their names."""
    found = [(Path(trainer.default_root_dir), ["hpc_ckpt_*.ckpt"])]
    for callback in callbacks(trainer):
        if isinstance(callback, OnExceptionCheckpoint):
            path = Path(os.path.abspath(callback.ckpt_path))
            found.append((path.parent, [path.name]))
        elif isinstance(callback, ModelCheckpoint) and callback.dirpath:
            # A slash in a metric's name makes directories.
            depth = (callback.filename or "").count("/") + 1
            patterns = ["*/" * level + "*.ckpt" for level in range(depth)]
            found.append((Path(os.path.abspath(callback.dirpath)), patterns))
    return [(folder, patterns) for folder, patterns in found if "://" not in str(folder)]


def _checkpoints(folder: Path, pattern: str) -> list[Path]:
    """Files, and directories of those saved in parts, which must be whole."""
    found = folder.glob(pattern) if folder.is_dir() else ()
    whole = ("meta.pt", "latest", "checkpoint")
    return [p for p in found if p.is_file() or any((p / name).exists() for name in whole)]


def newest_saved(trainer: L.Trainer) -> Path | None:
    """The newest checkpoint where this trainer, which is set up, writes its own."""
    folders = {directory_of(trainer) / "checkpoints"}
    folders |= {folder for folder, _ in checkpoint_directories(trainer)}
    return max((p for f in folders for p in _checkpoints(f, "*.ckpt")), key=_age, default=None)


def _age(path: Path) -> tuple[float, int]:
    """To compare checkpoints: when written, then the step in its name."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    step = re.search(r"step=(\d+)", path.name)
    return max(file.stat().st_mtime for file in files), int(step[1]) if step else -1


def _is_in(run: Path, place: Place) -> bool:
    return run == place.fixed if place.fixed is not None else run.parent == place.parent


def _requeued(trainer: L.Trainer) -> Path | None:
    """The checkpoint that a job saved before SLURM started it again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if not SLURMEnvironment.detect() or restarts in ("", "0"):
        return None
    found = trainer._checkpoint_connector._hpc_resume_path
    return None if found is None else Path(found)


def _check_unfinished(trainer: L.Trainer, path: Path, facts: Facts) -> None:
    """Refuse to boot an engine for nothing."""
    for name, limit, reached in (
        ("max_steps", trainer.max_steps, facts.step),
        ("max_epochs", trainer.max_epochs, facts.epochs),
    ):
        if limit is not None and limit != -1 and reached is not None and reached >= limit:
            raise NothingToTrain(
                f"{path} is at {name.removeprefix('max_').removesuffix('s')} {reached} and "
                f"trainer.{name}={limit}: nothing is left to train; raise trainer.{name}"
            )


def _guard(callback: Any) -> None:
    """Keep an ``OnExceptionCheckpoint`` from replacing a run's checkpoint by one of nothing, when
    a run fails before it trains, and from deleting it at the end of another run.

    What failed may be the very file that it would write over, refused.
    """
    save, remove = callback.on_exception, callback.teardown

    def on_exception(trainer: Any, *others: Any) -> None:
        if getattr(datamodule(trainer), "has_begun", True):
            save(trainer, *others)

    def teardown(trainer: Any, *others: Any, **more: Any) -> None:
        if str(trainer.ckpt_path) == str(callback.ckpt_path):
            remove(trainer, *others, **more)

    callback.on_exception, callback.teardown = on_exception, teardown


def _is_lightnings(path: Any) -> bool:
    text = str(path)
    return path is not None and (text in _LIGHTNINGS or ":" in text.split("/")[0])


def _say(trainer: L.Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(message)
