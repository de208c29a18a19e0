"""One device under every strategy: train, clip, gather, save, resume. Most of them want a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from simulated_fits import build, ledger

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


class Received(L.Callback):
    """The weights that the engine was given last, by name."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        weights = pl_module.named_weights(trainer.strategy.model)
        self.weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights}


def fit(checkpoint: Path, directory: Path, accelerator: str, strategy: str, **options: Any) -> Any:
    received = Received()
    keep = ModelCheckpoint(directory, filename="at-{step}", save_top_k=-1, every_n_train_steps=1)
    ckpt_path = options.pop("ckpt_path", None)
    trainer, module, data, _ = build(
        checkpoint,
        directory,
        callbacks=[received, keep],
        accelerator=accelerator,
        devices=1,
        strategy=strategy,
        accumulate_grad_batches=2,
        gradient_clip_val=0.02,
        enable_checkpointing=True,
        **options,
    )
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return received.weights


@pytest.mark.parametrize(
    ("accelerator", "strategy"),
    [
        ("cpu", "ddp"),
        pytest.param("gpu", "ddp", marks=needs_gpu),
        pytest.param("gpu", "fsdp", marks=needs_gpu),
        pytest.param("gpu", "deepspeed_stage_2", marks=needs_gpu),
        pytest.param("gpu", "deepspeed_stage_3", marks=needs_gpu),
    ],
)
def test_a_strategy_trains_as_one_process_and_resumes(
    tiny_checkpoint: Path, tmp_path: Path, accelerator: str, strategy: str
) -> None:
    alone = fit(tiny_checkpoint, tmp_path / "alone", accelerator, "auto", max_steps=4)
    straight = fit(tiny_checkpoint, tmp_path / "straight", accelerator, strategy, max_steps=4)
    assert set(straight) == set(alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(straight[name], tensor, rtol=1e-3, atol=1e-5)
    place = tmp_path / "resumed"
    fit(tiny_checkpoint, place, accelerator, strategy, max_steps=2)
    half = place / "at-step=2.ckpt"
    resumed = fit(tiny_checkpoint, place, accelerator, strategy, max_steps=4, ckpt_path=half)
    assert ledger(place) == ledger(tmp_path / "straight")
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-6)
