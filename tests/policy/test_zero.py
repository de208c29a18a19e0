"""Settings of DeepSpeed's that cannot work are refused before an engine boots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn

from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.lora import LoRA
from copris_lightning.policy.settings import Precision
from copris_lightning.policy.sharding import check_strategy


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def trainer(
    strategy: DeepSpeedStrategy,
    *,
    kl: KLPenalty | None = None,
    lora: LoRA | None = None,
    dtype: str = "float32",
    fn: TrainerFn = TrainerFn.FITTING,
    **options: Any,
) -> Any:
    module = SimpleNamespace(
        precision=Precision(dtype),
        estimator=SimpleNamespace(kl=kl),
        lora=lora,
        optimizer=lambda parameters: torch.optim.AdamW(parameters),
    )
    settings = {"precision": "32-true", "gradient_clip_algorithm": None, **options}
    return SimpleNamespace(
        strategy=strategy, lightning_module=module, state=SimpleNamespace(fn=fn), **settings
    )


REFERENCE = {"kl": KLPenalty(reference="another")}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_algorithm": "norm"},
        {"precision": "bf16-mixed", "dtype": "bfloat16"},
        {"kl": KLPenalty(), "lora": LoRA()},
    ],
)
def test_what_works_is_let_through(stage: int, options: dict[str, Any]) -> None:
    check_strategy(trainer(DeepSpeedStrategy(stage=stage), **options))


def test_stage_2_holds_a_reference_and_evaluates() -> None:
    check_strategy(trainer(DeepSpeedStrategy(stage=2), **REFERENCE))
    check_strategy(trainer(DeepSpeedStrategy(stage=2), fn=TrainerFn.VALIDATING))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": KLPenalty()}, r"estimator\.kl: .*deepspeed_stage_2"),
        ({**REFERENCE, "lora": LoRA()}, r"estimator\.kl: .*deepspeed_stage_2"),
        ({"fn": TrainerFn.TESTING}, r"not to test; make one file"),
        ({"gradient_clip_algorithm": "value"}, r"gradient_clip_algorithm=value .* use norm"),
        ({"dtype": "bfloat16"}, r"dtype=bfloat16: .*precision=32-true.* set dtype=float32"),
    ],
)
def test_what_stage_3_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_strategy(trainer(DeepSpeedStrategy(stage=3), **options))


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("optimizer", {"type": "AdamW"}, "optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "lr_scheduler"),
        ("gradient_accumulation_steps", 4, r"trainer\.accumulate_grad_batches"),
        ("gradient_clipping", 1.0, r"trainer\.gradient_clip_val"),
    ],
)
def test_a_setting_that_has_another_place_is_told_it(key: str, value: Any, ours: str) -> None:
    strategy = DeepSpeedStrategy(config={"zero_optimization": {"stage": 2}, key: value})
    with pytest.raises(ConfigurationError, match=rf"config: {key}=.* is not read; set {ours}"):
        check_strategy(trainer(strategy))
    # Once Lightning has written down what the trainer says there, it is no setting any more.
    strategy._config_initialized = True
    check_strategy(trainer(strategy))


@pytest.mark.parametrize(
    "options",
    [
        {"offload_optimizer": True},
        {"offload_optimizer": True, "offload_parameters": True, "stage": 3},
    ],
)
def test_offloading_needs_an_optimizer_of_deepspeeds(options: dict[str, Any]) -> None:
    run = trainer(DeepSpeedStrategy(**options))
    with pytest.raises(ConfigurationError, match=r"optimizer=AdamW, .*DeepSpeedCPUAdam"):
        check_strategy(run)
