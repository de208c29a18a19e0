"""What two processes do together under DeepSpeed for ``tests/test_deepspeed.py``.

Run as ``deepspeed_ranks.py CHECKPOINT DIRECTORY SCENARIO...`` by each rank, as ``ranks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks
import torch
from copris_testing import SomePrompts
from deepspeed_on_cpu import CPUDeepSpeedStrategy, CPUForDeepSpeed
from lightning.pytorch.callbacks import ModelCheckpoint
from simulated_fits import build
from some_rewards import failing as failing_reward

from copris_lightning import Evaluation
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.errors import ConfigurationError, QuarantineError, RewardError, RolloutError
from copris_lightning.quickstart.warm_start import tiny_model

SCENARIOS: dict[str, Callable[[Path, Path], Any]] = {}

UNEVEN: dict[str, Any] = {
    "accumulate_grad_batches": 1,
    "data": {"groups": 1, "cap": 2},
    "model": {"logprob_chunk_tokens": 4},
}
"""A trajectory per rank: one has more chunks of logits than the other."""

TWO_UPDATES: dict[str, Any] = {"data": {"updates": 2, "groups": 8}, "max_steps": 4}


def falling(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def scenario(function: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


class Recorder(ranks.Recorder):
    """DeepSpeed comes to the hook after every micro-batch, and has gradients after the last."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.strategy.model.is_gradient_accumulation_boundary():
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def gradient(self, parameter: Any) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        full: torch.Tensor = safe_get_full_grad(parameter)
        return full


def train(stage: int, checkpoint: Path, directory: Path, **options: Any) -> dict[str, Any]:
    return ranks.train(
        CPUDeepSpeedStrategy(stage),
        checkpoint,
        directory,
        recorder=Recorder(),
        accelerator=CPUForDeepSpeed(),
        **options,
    )


def resume(stage: int, checkpoint: Path, directory: Path, *, at: int, **options: Any) -> Any:
    keep = ModelCheckpoint(
        directory, filename="at-{step}", save_top_k=1, every_n_train_steps=1, save_last=True
    )
    saving: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [keep]}
    train(stage, checkpoint, directory, **{**options, **saving, "max_steps": at})
    return train(stage, checkpoint, directory, ckpt_path=directory / "last.ckpt", **options)


@scenario
def stage_2(checkpoint: Path, directory: Path) -> Any:
    return train(2, checkpoint, directory)


@scenario
def stage_3(checkpoint: Path, directory: Path) -> Any:
    return train(3, checkpoint, directory)


@scenario
def stage_3_uneven(checkpoint: Path, directory: Path) -> Any:
    return train(3, checkpoint, directory, **UNEVEN)


@scenario
def stage_2_with_adapters(checkpoint: Path, directory: Path) -> Any:
    """After stage 3 in the same process, of which nothing may be left."""
    return train(2, checkpoint, directory, model=ranks.trained_adapters())


@scenario
def stage_3_with_adapters(checkpoint: Path, directory: Path) -> Any:
    return train(3, checkpoint, directory, model=ranks.trained_adapters())


@scenario
def stage_3_with_adapters_and_a_head(checkpoint: Path, directory: Path) -> Any:
    """An output head of its own, frozen; the engine gets adapters alone."""
    untied = tiny_model(directory / "untied", hidden_size=64, layers=2, tied=False)
    torch.distributed.barrier()
    model = ranks.trained_adapters()
    return train(3, untied, directory, **{**UNEVEN, "model": {**UNEVEN["model"], **model}})


@scenario
def stage_2_with_a_reference(checkpoint: Path, directory: Path) -> Any:
    model = {"kl": KLPenalty(0.1), "gradient_checkpointing": True}
    return train(2, checkpoint, directory, model=model)


@scenario
def stage_2_in_mixed_precision(checkpoint: Path, directory: Path) -> Any:
    return train(2, checkpoint, directory, precision="bf16-mixed", max_steps=1)


@scenario
def stage_2_resumed(checkpoint: Path, directory: Path) -> Any:
    return resume(2, checkpoint, directory, at=2, model={"lr_scheduler": falling})


@scenario
def stage_3_resumed(checkpoint: Path, directory: Path) -> Any:
    return resume(3, checkpoint, directory, at=2, model=ranks.trained_adapters())


@scenario
def stage_2_resumed_within_a_batch(checkpoint: Path, directory: Path) -> Any:
    return resume(2, checkpoint, directory, at=3, **TWO_UPDATES)


@scenario
def stage_3_resumed_within_a_batch(checkpoint: Path, directory: Path) -> Any:
    return resume(3, checkpoint, directory, at=3, **TWO_UPDATES)


def cut_within_a_step(stage: int, checkpoint: Path, directory: Path) -> Any:
    """What goes on from a checkpoint between two micro-batches of a step."""
    save = ranks.SaveWithinAStep(directory)
    options: dict[str, Any] = {"data": {"updates": 2}, "max_steps": 6}
    uncut = train(stage, checkpoint, directory / "uncut", callbacks=[save], **options)
    cut = train(stage, checkpoint, directory / "cut", ckpt_path=save.file, **options)
    return {"uncut": uncut, "cut": cut}


@scenario
def stage_2_cut_within_a_step(checkpoint: Path, directory: Path) -> Any:
    return cut_within_a_step(2, checkpoint, directory)


@scenario
def stage_3_cut_within_a_step(checkpoint: Path, directory: Path) -> Any:
    return cut_within_a_step(3, checkpoint, directory)


def validate(stage: int, checkpoint: Path, directory: Path, ckpt_path: Path) -> Any:
    trainer, module, data, _ = build(
        checkpoint,
        directory,
        strategy=CPUDeepSpeedStrategy(stage),
        accelerator=CPUForDeepSpeed(),
        devices=2,
        data={"evaluations": {"val": Evaluation(SomePrompts(4))}},
        model=ranks.trained_adapters() if stage == 3 else None,
    )
    try:
        return trainer.validate(module, data, ckpt_path=ckpt_path)
    except ConfigurationError as error:
        return str(error)


@scenario
def stage_2_validated(checkpoint: Path, directory: Path) -> Any:
    return validate(2, checkpoint, directory, directory.parent / "stage_2_resumed/last.ckpt")


@scenario
def stage_3_validated(checkpoint: Path, directory: Path) -> Any:
    return validate(3, checkpoint, directory, directory.parent / "stage_3_resumed/last.ckpt")


@scenario
def quarantined(checkpoint: Path, directory: Path) -> Any:
    poisoned = ranks.poisoned(checkpoint, directory)
    data = {"behavior_logprobs": "engine", "max_quarantined": 1.0}
    return train(3, poisoned, directory, data=data)


@scenario
def too_many_quarantined(checkpoint: Path, directory: Path) -> Any:
    poisoned = ranks.poisoned(checkpoint, directory)
    data = {"behavior_logprobs": "engine", "max_quarantined": 0.0}
    try:
        train(3, poisoned, directory, data=data)
    except QuarantineError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def fail(checkpoint: Path, directory: Path, **data: Any) -> str:
    try:
        train(3, checkpoint, directory, data={"reward": failing_reward, **data})
    except (RewardError, RolloutError) as error:
        return repr(error)
    raise AssertionError("nothing was raised")


@scenario
def failing(checkpoint: Path, directory: Path) -> Any:
    return fail(checkpoint, directory)


@scenario
def failing_in_validation(checkpoint: Path, directory: Path) -> Any:
    return fail(checkpoint, directory, evaluations={"val": Evaluation(SomePrompts(4))})


if __name__ == "__main__":
    ranks.main(SCENARIOS)
