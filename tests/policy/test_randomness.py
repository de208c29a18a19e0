"""A policy asked twice gives the same, whatever its config says of dropout and noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, tiny_architecture
from copris_testing import SomePrompts
from simulated_fits import LoggingModule, build
from torch import Tensor, nn

from copris_lightning import Evaluation
from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.policy import Policy
from copris_lightning.policy.pretrained import load_model
from copris_lightning.policy.randomness import without_noise


def batch() -> MicroBatch:
    rows = []
    for i in range(4):
        rows.append(Trajectory(0, i, "p", (5, 6 + i), 5))
        rows[-1].observe([3 + i, 17, 9, 4, 30 + i])
    return collate(rows, source=None)


def noisy(checkpoint: Path) -> list[str]:
    """Turns up every rate in a checkpoint's config; their names."""
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    rates = [name for name in config if "drop" in name or "jitter" in name]
    assert rates, "the architecture has none"
    file.write_text(json.dumps(config | dict.fromkeys(rates, 0.4)))
    return rates


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_gives_the_same_twice_in_training_mode(
    model_type: str, tmp_path: Path
) -> None:
    checkpoint = tiny_architecture(model_type, tmp_path)
    noisy(checkpoint)
    model = load_model(str(checkpoint), dtype="float32", attn_implementation="eager").train()
    policy = Policy(model, chunk_tokens=64)
    policy.model.gradient_checkpointing_enable()
    first, second = (policy(batch())[0] for _ in range(2))
    assert torch.equal(first, second)
    # Layers are recomputed in training mode only.
    assert model.training
    assert torch.allclose(policy.eval()(batch())[0], first, atol=1e-5)


def test_rates_are_found_in_nested_configs_and_other_fields_are_left_alone() -> None:
    from transformers import Gemma3Config

    config = Gemma3Config()
    config.text_config.attention_dropout = 0.1
    config.vision_config.attention_dropout = 0.2
    config.text_config.drops_tokens, config.text_config.rope_scale = True, 0.5
    without_noise(config)
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0
    assert (config.text_config.drops_tokens, config.text_config.rope_scale) == (True, 0.5)


class Noisy(nn.Module):
    """Draws random numbers that no config knows of."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * (1 + 0.1 * torch.rand_like(y)) if self.training else y


class NoisyModule(LoggingModule):
    def configure_model(self) -> None:
        super().configure_model()
        assert self.policy is not None
        layer: Any = self.policy.model.get_submodule("model.layers.1")
        if not isinstance(layer.mlp, Noisy):
            layer.mlp = Noisy(layer.mlp)


@pytest.mark.parametrize("validation", [False, True])
def test_a_policy_that_gives_two_answers_is_refused_before_anything_is_generated(
    tiny_checkpoint: Path, tmp_path: Path, validation: bool
) -> None:
    settings = {"evaluations": {"some": Evaluation(SomePrompts(4))}} if validation else {}
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data=settings, max_steps=2)
    module.__class__ = NoisyModule
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp \(Noisy\)") as error:
        trainer.fit(module, datamodule=data)
    assert f"model={str(tiny_checkpoint)!r}" in str(error.value)
    assert log == []
