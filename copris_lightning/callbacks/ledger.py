"""One JSON object per trained trajectory: how anyone can check that nothing is lost or doubled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L

from copris_lightning.core.batching import MicroBatch
from copris_lightning.errors import ConfigurationError
from copris_lightning.trainer_parts import datamodule, is_dry_run


class TrajectoryLedger(L.Callback):
    """Writes ``ledger/batch_000012.jsonl`` per batch, and ``predictions.jsonl`` in ``predict``.

    A line holds the batch's number, prompt id, sample, segments (version and tokens of each),
    finish reason, lengths, reward, advantage and the response's text; ``excluded`` says why if it
    was left out of the loss (truncated, or quarantined for something not finite). A file appears
    whole, after the batch was trained on; a run resumed from a checkpoint writes the later ones
    again. ``fast_dev_run`` writes none.

    Args:
        directory: where to; by default the run's log directory.

    Raises:
        ConfigurationError: a new run would write among another's batches.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory
        self._root = Path()
        self._is_dry = False
        self._quarantined: set[str] = set()
        self._at_step: list[str] = []
        """Those of the open batch, on all ranks, at its last whole optimizer step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out where the run logs (on every rank: Lightning asks rank 0)."""
        self._root = Path(self.directory or trainer.log_dir or trainer.default_root_dir)
        self._is_dry = is_dry_run(trainer)
        self._quarantined, self._at_step = set(), []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to mix a new run's batches with an older run's."""
        data = datamodule(trainer)
        is_new = data.training.batch_index < 0 and not self._is_dry
        if is_new and trainer.is_global_zero and any(self._root.glob("ledger/batch_*.jsonl")):
            raise ConfigurationError(
                f"{self._root / 'ledger'} holds the ledger of another run; set "
                "TrajectoryLedger.directory, or resume that run with --ckpt_path"
            )

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
                shares = data.training.gather(sorted(self._quarantined))
                self._at_step = sorted({name for share in shares for name in share})
            return
        shares = data.training.gather(sorted(self._quarantined))
        self._quarantined, self._at_step = set(), []
        if data.session is None or self._is_dry:
            return
        names = {name for share in shares for name in share}
        for group in data.training.delivered:
            for trajectory in group.trajectories:
                if trajectory.name in names:
                    trajectory.excluded = "the policy's log-probs in training are not finite"
        index = data.training.batch_index
        records = (
            {"batch": index, **data.session.record(trajectory)}
            for group in data.training.delivered
            for trajectory in group.trajectories
        )
        _write(self._root / "ledger" / f"batch_{index:06d}.jsonl", records)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the open batch."""
        return {"quarantined": self._at_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the open batch."""
        self._at_step = list(state_dict["quarantined"])
        self._quarantined = set(self._at_step)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write all responses down."""
        if trainer.is_global_zero:
            batches: Any = trainer.predict_loop.predictions
            _write(self._root / "predictions.jsonl", (r for batch in batches for r in batch))


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
