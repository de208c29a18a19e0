"""What trainer, module and engine have to agree on is refused before an engine boots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from copris_lightning.callbacks.weight_sync import WeightSync
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.losses import ClippedPolicyLoss
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.core.estimator.ratios import TokenRatio
from copris_lightning.datamodules.checks import check_epochs
from copris_lightning.datamodules.divide import BatchShape
from copris_lightning.datamodules.steps import epoch_micro_batches
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.settings import Precision


def trainer(strategy: Any, engine: Any = None, kl: KLPenalty | None = None) -> Any:
    estimator = Estimator(loss=ClippedPolicyLoss(), ratio=TokenRatio(), kl=kl)
    return SimpleNamespace(
        strategy=strategy,
        precision="32-true",
        lightning_module=SimpleNamespace(precision=Precision("float32"), estimator=estimator),
        datamodule=SimpleNamespace(engine=engine),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance", "is_refused"),
    [
        ("bfloat16", 1e-4, True),
        ("half", 1e-4, True),
        ("bfloat16", 0.1, False),
        ("bfloat16", None, False),
        ("float32", 1e-4, False),
        ("float", 1e-4, False),
        ("auto", 1e-4, False),
        ("bfloat16", "auto", False),
    ],
)
def test_an_engine_in_another_precision_needs_a_wider_number(
    dtype: str, tolerance: Any, is_refused: bool
) -> None:
    sync = WeightSync(parity_tolerance=tolerance)
    run = trainer(SingleDeviceStrategy("cpu"), VLLMEngine({"dtype": dtype}))
    if not is_refused:
        sync.check(run)
        return
    with pytest.raises(ConfigurationError, match=r"engine_args\.dtype=\w+ is not precision\.dtype"):
        sync.check(run)


LENGTH = 8
"""Batches that the data set makes."""


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(
    "limit", [None, 1, 2, 3, 4, 6, 12, 40, 41, 1000, 0.0, 0.01, 0.15, 0.25, 0.34, 0.5, 0.9, 1.0]
)
def test_every_limit_of_an_epoch_is_one_of_whole_batches_or_refused(
    shape: tuple[int, int], epochs: int, limit: float | None
) -> None:
    divided = BatchShape(1, *shape, 64)
    length = LENGTH * divided.per_batch
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=limit,
        accumulate_grad_batches=divided.micro_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    planned = epoch_micro_batches(run, length)
    whole = planned % divided.per_batch == 0 and (planned > 0 or limit == 0)
    if whole:
        check_epochs(run, divided, length)
        return
    with pytest.raises(ConfigurationError, match=rf"limit_train_batches={limit} of {length} ends"):
        check_epochs(run, divided, length)


@pytest.mark.parametrize("overfit", [1, 4, 0.5])
def test_overfitting_on_a_stream_is_refused(overfit: float) -> None:
    run = L.Trainer(accelerator="cpu", overfit_batches=overfit, logger=False)
    with pytest.raises(ConfigurationError, match=rf"overfit_batches={overfit}.*few of them"):
        check_epochs(run, BatchShape(1, 1, 1, 64), 8)


@pytest.mark.parametrize("batches", [1, 3])
def test_a_dry_run_is_one_of_whole_batches_also_when_repeated(batches: int) -> None:
    run = L.Trainer(accelerator="cpu", fast_dev_run=batches, accumulate_grad_batches=4)
    for _ in range(2):
        check_epochs(run, BatchShape(1, 2, 4, 64), 80)
        assert run.limit_train_batches == batches * 8
        assert run.max_steps == batches * 2
