"""The progress bar counts batches of the whole run, however they are divided, and its time left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from simulated_fits import build

from copris_lightning import RolloutProgressBar


class Bar(RolloutProgressBar):
    """Writes down what it shows after each micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, int | None]] = []
        self.lines: list[str] = []

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.shown.append((self.train_progress_bar.n, self.train_progress_bar.total))
        self.lines.append(str(self.train_progress_bar))


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        ({"max_steps": 6}, 3),  # of two updates each
        ({"max_steps": -1, "max_epochs": 1}, 6),  # 24 prompts, 4 a batch
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 6}, 2),
        ({"max_steps": 4, "max_epochs": 10, "limit_train_batches": 6}, 2),
    ],
)
def test_the_bar_counts_batches(
    limits: dict[str, int], batches: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bar = Bar()
    options = {"accumulate_grad_batches": 3, "enable_progress_bar": True, **limits}
    data = {"updates": 2}
    trainer, module, datamodule, _ = build(
        tiny_checkpoint, tmp_path, callbacks=[bar], data=data, **options
    )
    trainer.fit(module, datamodule=datamodule)
    expected = [((i + 1) // 6, batches) for i in range(6 * batches)]
    assert bar.shown == expected
    # Elapsed and left are known once a batch is done.
    assert "<?" in bar.lines[0]
    assert f" {batches}/{batches} " in bar.lines[-1]
    assert "<00:00" in bar.lines[-1]


def test_a_resumed_bar_goes_on_where_the_first_one_stopped(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = {"enable_progress_bar": True, "enable_checkpointing": True}
    save = ModelCheckpoint(tmp_path, filename="first", every_n_train_steps=2)
    trainer, module, data, _ = build(
        tiny_checkpoint, tmp_path, callbacks=[save], max_steps=2, **options
    )
    trainer.fit(module, datamodule=data)
    bar = Bar()
    trainer, module, data, _ = build(
        tiny_checkpoint, tmp_path, callbacks=[bar], max_steps=5, **options
    )
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "first.ckpt")
    assert bar.shown == [(3, 5), (4, 5), (5, 5)]
