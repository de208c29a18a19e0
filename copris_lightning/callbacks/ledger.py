"""One JSON object per trained trajectory: how anyone can check that nothing is lost or doubled."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import lightning as L

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.outcome import Excluded
from copris_lightning.directories import check_writable
from copris_lightning.errors import ConfigurationError
from copris_lightning.runs.directory import directory_of, is_resumed, on_rank_zero, place_of, record
from copris_lightning.trainer_parts import datamodule, is_dry_run

_NOT_FINITE = Excluded("the policy's log-probs in training are not finite")


class TrajectoryLedger(L.Callback):
    """Writes ``ledger/batch_000012.jsonl`` per batch, and ``predictions.jsonl`` in ``predict``.

    A line holds the batch's number, prompt id, sample, segments (versions of each and its tokens),
    finish reason, lengths, reward, advantage and the response's text; ``excluded`` says why if it
    was left out of the loss (truncated, or quarantined for something not finite). A file appears
    whole, after the batch was trained on. A run that goes on from a checkpoint sets the files of
    later batches aside, in ``ledger/abandoned_N/``, and writes these batches again.
    ``fast_dev_run`` writes none.

    Args:
        directory: where to; by default the run's own (:mod:`copris_lightning.runs.directory`).

    Raises:
        ConfigurationError: a new run would write among another's batches, another process writes
            there now, or nothing can be written there.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._root = Path()
        self._is_dry = False
        self._quarantined: set[str] = set()
        self._at_step: list[str] = []
        """Those of the open batch, on all ranks, at its last whole optimizer step."""
        self._lock: IO[str] | None = None

    def open(self, trainer: L.Trainer, stage: str) -> None:
        """Find out where to write, and that it can be done. Before the engine boots."""
        self._root = Path(self.directory).absolute() if self.directory else directory_of(trainer)
        self._is_dry = is_dry_run(trainer)
        self._quarantined, self._at_step = set(), []
        if not self._is_dry and stage in ("fit", "predict"):
            on_rank_zero(trainer, lambda: self._check(trainer, stage))

    def _check(self, trainer: L.Trainer, stage: str) -> None:
        key = "TrajectoryLedger.directory" if self.directory else place_of(trainer).key
        folder = self._root / "ledger" if stage == "fit" else self._root
        check_writable(folder, key)
        if stage != "fit":
            return
        if not is_resumed(trainer) and any(folder.glob("batch_*.jsonl")):
            raise ConfigurationError(
                f"{folder} holds the ledger of another run; set another "
                "TrajectoryLedger.directory or logger's version, or resume that run with "
                "--ckpt_path"
            )
        self._close()
        self._lock = _locked(self._root / ".ledger.lock")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set aside what an older checkpoint's run is going to write again."""
        first = datamodule(trainer).feed.trained_batches
        if trainer.is_global_zero and not self._is_dry:
            _set_aside(self._root / "ledger", first)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let others write there."""
        self._close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """The same: Lightning does not call ``teardown`` after an exception."""
        self._close()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say in the checkpoint whose it is."""
        record(trainer, checkpoint)

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Write the batch down once all of it was trained on."""
        data = datamodule(trainer)
        self._quarantined.update(outputs["quarantined"])
        if not batch.is_last:
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                shares = data.ranks.gather(sorted(self._quarantined)) or []
                self._at_step = sorted({name for share in shares for name in share})
            return
        shares = data.ranks.gather(sorted(self._quarantined)) or []
        self._quarantined, self._at_step = set(), []
        if data.session is None or self._is_dry:
            return
        names = {name for share in shares for name in share}
        for trajectory in data.feed.batch.rows:
            if trajectory.name in names:
                trajectory.credit = replace(trajectory.credit, excluded=_NOT_FINITE)
        index = data.feed.batch.index
        records = (
            {"batch": index, **data.session.record(trajectory)}
            for trajectory in data.feed.batch.rows
        )
        _write(self._root / "ledger" / f"batch_{index:06d}.jsonl", records)

    @property
    def state_key(self) -> str:
        """A trainer may have several, in different directories."""
        return self._generate_state_key(directory=self.directory)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the open batch."""
        return {"quarantined": self._at_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the open batch."""
        self._at_step = list(state_dict["quarantined"])
        self._quarantined = set(self._at_step)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write all responses down."""
        if trainer.is_global_zero and not self._is_dry:
            batches: Any = trainer.predict_loop.predictions
            _write(self._root / "predictions.jsonl", (r for batch in batches for r in batch))


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def _locked(path: Path) -> IO[str]:
    """A file that no other process holds; let go when it is closed, or this process ends."""
    file = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigurationError(
            f"{path.parent / 'ledger'}: another run writes its ledger there now; wait for its "
            "end, or set another TrajectoryLedger.directory or logger's version"
        ) from None
    return file


def _set_aside(folder: Path, first: int) -> None:
    """Move the batches from ``first`` on to a directory of their own."""
    later = [p for p in folder.glob("batch_*.jsonl") if int(p.stem.split("_")[1]) >= first]
    if not later:
        return
    number = 0
    while (aside := folder / f"abandoned_{number}").exists():
        number += 1
    aside.mkdir()
    for path in later:
        os.replace(path, aside / path.name)
    print(f"{len(later)} batches from {first} on, which come again, were moved to {aside}")
