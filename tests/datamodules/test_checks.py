"""What trainer, module and engine have to agree on is refused before an engine boots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy

from copris_lightning.callbacks.weight_sync import WeightSync
from copris_lightning.core.estimator import PolicyGradient
from copris_lightning.core.losses import ClippedPolicyLoss
from copris_lightning.core.penalties import KLPenalty
from copris_lightning.core.ratios import TokenRatio
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.vllm import VLLMEngine


def trainer(strategy: Any, engine: Any = None, kl: KLPenalty | None = None) -> Any:
    estimator = PolicyGradient(loss=ClippedPolicyLoss(), ratio=TokenRatio(), kl=kl)
    return SimpleNamespace(
        strategy=strategy,
        precision="32-true",
        lightning_module=SimpleNamespace(dtype_name="float32", estimator=estimator),
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
    ],
)
def test_an_engine_in_another_precision_needs_a_wider_tolerance(
    dtype: str, tolerance: float | None, is_refused: bool
) -> None:
    sync = WeightSync(parity_tolerance=tolerance)
    run = trainer(SingleDeviceStrategy("cpu"), VLLMEngine({"dtype": dtype}))
    if not is_refused:
        sync.check(run)
        return
    with pytest.raises(ConfigurationError, match=r"engine_args\.dtype=\w+ is not model\.init_args"):
        sync.check(run)
