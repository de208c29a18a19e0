"""Where a run writes: a directory of its own, decided before anything slow starts.

A new run gets the next ``version_N`` under its name, also where Lightning would have all runs of a
name share one directory (no logger, or one such as ``WandbLogger``). A resumed run goes on in the
directory of its checkpoint's run.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from copris_lightning.directories import check_writable, unwritable
from copris_lightning.errors import ConfigurationError
from copris_lightning.trainer_parts import callbacks, is_dry_run

T = TypeVar("T")

RECORD = "copris_run"
"""The key of a checkpoint under which the directory of its run stands."""

_VERSION = re.compile(r"version_(\d+)")
_VERSIONED = (TensorBoardLogger, CSVLogger)
"""Loggers with a directory for each run."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the runs of one name are.

    Attributes:
        parent: holds a directory for each.
        fixed: the directory that the user chose with a logger's ``version``.
        key: the setting that decides this.
    """

    parent: Path
    fixed: Path | None
    key: str

    def runs(self) -> list[Path]:
        """The directories of all runs, the newest first."""
        if self.fixed is not None:
            return [self.fixed] if self.fixed.is_dir() else []
        found = [path for path in _listed(self.parent) if _number(path) >= 0 and path.is_dir()]
        return sorted(found, key=_number, reverse=True)


@dataclass(slots=True)
class _Run:
    directory: Path | None
    """Rank 0's decision; on the others, after they were told."""
    checkpoint: Path | None
    problem: ConfigurationError | None = None
    is_agreed: bool = False


_runs: WeakKeyDictionary[L.Trainer, _Run] = WeakKeyDictionary()


def place_of(trainer: L.Trainer) -> Place:
    """Where runs of this trainer's name are, by its first logger."""
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    root = Path(_local(trainer.default_root_dir) or os.getcwd())
    if isinstance(logger, _VERSIONED) and _local(logger.save_dir) is not None:
        parent = _absolute(logger.root_dir)
        version = logger._version
        fixed = None if version is None else parent / _name(version)
        return Place(parent, fixed, "trainer.logger.init_args.save_dir")
    if logger is None:
        return Place(_absolute(root / "lightning_logs"), None, "trainer.default_root_dir")
    if isinstance(logger, MLFlowLogger):  # its own directory holds nothing but what it put there
        return Place(_absolute(root / logger._experiment_name), None, "trainer.default_root_dir")
    save_dir = _local(logger.save_dir) or root
    parent = _absolute(Path(save_dir) / str(logger.name or "lightning_logs"))
    return Place(parent, None, "trainer.logger.init_args.save_dir")


def decide(trainer: L.Trainer, command: str, checkpoint: Path | None, run: Path | None) -> None:
    """Choose the run's directory, on rank 0, and point loggers and checkpoints at it.

    Args:
        trainer: about to run; nothing of it is set up.
        command: ``fit``, which writes checkpoints, or another.
        checkpoint: what it goes on from.
        run: the directory of that checkpoint's run, if it is known.

    Raises:
        ConfigurationError: nothing can be written there.
    """
    if is_dry_run(trainer):
        return
    if trainer in _runs:  # whose loggers write somewhere already
        _runs[trainer].checkpoint = checkpoint
        return
    if not trainer.is_global_zero:
        _runs[trainer] = _Run(None, checkpoint)
        return
    place = place_of(trainer)
    try:
        directory = _directory(trainer, place, run)
        check_writable(directory, place.key)
        for path, key in checkpoint_directories(trainer) if command == "fit" else ():
            check_writable(path, key)
    except ConfigurationError as problem:
        if trainer.world_size == 1 or not _is_launched():
            raise
        # The other ranks wait for this one, and are told in `directory_of`.
        _runs[trainer] = _Run(None, checkpoint, problem)
        return
    _point_loggers(trainer, directory)
    _runs[trainer] = _Run(directory, checkpoint)


def directory_of(trainer: L.Trainer) -> Path:
    """The run's directory. All ranks must ask, the first time; from ``setup`` on.

    Raises:
        ConfigurationError: rank 0 could not have one, or another rank goes on from another
            checkpoint.
    """
    run = _runs.get(trainer)
    if run is None:
        own = trainer.log_dir or trainer.default_root_dir
        run = _runs[trainer] = _Run(Path(own), None)
    if not run.is_agreed:
        told = (run.directory, run.checkpoint, run.problem)
        run.directory, checkpoint, problem = trainer.strategy.broadcast(told)
        if problem is not None:
            raise problem
        run.is_agreed = True
        if trainer.world_size > 1:
            _check_agreement(trainer, checkpoint, run.checkpoint)
        for callback in callbacks(trainer):
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.join(str(run.directory), "checkpoints")
    assert run.directory is not None
    return run.directory


def is_resumed(trainer: L.Trainer) -> bool:
    """Whether the run goes on from a checkpoint."""
    run = _runs.get(trainer)
    return run is not None and run.checkpoint is not None


def record(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Note the run's directory in a checkpoint, which may be saved elsewhere."""
    run = _runs.get(trainer)
    if run is not None and run.directory is not None:
        checkpoint[RECORD] = str(run.directory)


def on_rank_zero(trainer: L.Trainer, work: Callable[[], T]) -> T:
    """Rank 0's result, on every rank, or its :class:`ConfigurationError`."""
    outcome: T | ConfigurationError | None = None
    if trainer.is_global_zero:
        try:
            outcome = work()
        except ConfigurationError as problem:
            outcome = problem
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, ConfigurationError):
        raise outcome
    return cast("T", outcome)


def _directory(trainer: L.Trainer, place: Place, run: Path | None) -> Path:
    """The run's directory, made."""
    is_versioned = bool(trainer.loggers) and isinstance(trainer.loggers[0], _VERSIONED)
    if run is not None:
        # A logger that names its runs' directories writes where its settings say.
        if not is_versioned or run in (place.fixed, place.parent / run.name):
            return run
        if place.fixed is None:
            print(f"goes on from {run} in a directory of its own: {place.key} or name is not its")
    return place.fixed or _claim(place)


def _claim(place: Place) -> Path:
    """Make the next ``version_N``, so that no two processes get the same one."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number = max((_number(path) for path in _listed(place.parent)), default=-1) + 1
        while True:
            try:
                (place.parent / f"version_{number}").mkdir()
                return place.parent / f"version_{number}"
            except FileExistsError:
                number += 1
    except OSError as error:
        raise unwritable(place.parent, place.key, error) from error


def _point_loggers(trainer: L.Trainer, directory: Path) -> None:
    """Have the loggers write to the run's directory, and keep what is there."""
    match = _VERSION.fullmatch(directory.name)
    version = int(match[1]) if match else directory.name
    for logger in trainer.loggers:
        if isinstance(logger, _VERSIONED) and _absolute(logger.root_dir) == directory.parent:
            if logger._version is None:
                logger._version = version
            if isinstance(logger, CSVLogger):
                _keep_rows(logger)


def _keep_rows(logger: CSVLogger) -> None:
    """Lightning deletes the rows of a directory that it finds; and forgets their columns."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file() or logger._experiment is not None:
        return
    kept = path.with_name("metrics.kept.csv")
    os.replace(path, kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will be deleted when the new ones are saved.*")
        writer = logger.experiment
    os.replace(kept, path)
    with path.open(encoding="utf-8", newline="") as file:
        columns = file.readline().strip()
    writer.metrics_keys.extend(columns.split(",") if columns else [])


def checkpoint_directories(trainer: L.Trainer) -> list[tuple[Path, str]]:
    """Where the user wants checkpoints, and by which setting."""
    found = []
    for callback in callbacks(trainer):
        if isinstance(callback, ModelCheckpoint | OnExceptionCheckpoint) and callback.dirpath:
            path = _local(callback.dirpath)
            if path is not None:
                key = f"trainer.callbacks ({type(callback).__name__}.dirpath)"
                found.append((_absolute(path), key))
    return found


def _check_agreement(trainer: L.Trainer, theirs: Path | None, own: Path | None) -> None:
    """Refuse ranks that looked for the last checkpoint at different times."""
    is_same = trainer.strategy.reduce_boolean_decision(theirs == own, all=True)
    if not is_same:
        raise ConfigurationError(
            f"--ckpt_path: rank 0 goes on from {theirs}, another rank from another checkpoint; "
            "give the path of one"
        )


def _is_launched() -> bool:
    """Whether other ranks may run by now: those that Lightning starts come with ``fit``."""
    return "WORLD_SIZE" in os.environ or "SLURM_NTASKS" in os.environ


def _listed(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _number(path: Path) -> int:
    match = _VERSION.fullmatch(path.name)
    return int(match[1]) if match else -1


def _name(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _local(path: Any) -> str | None:
    """A path on this machine's file system; ``None`` for a bucket's."""
    return None if path is None or "://" in str(path) else str(path)


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expandvars(os.path.expanduser(path))))
