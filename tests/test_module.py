"""The LightningModule: log-probs, the scaled loss, and gradients under any split."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from copris_testing import reference_logprobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copris_lightning.core.batching import collate
from copris_lightning.core.trajectory import PromptGroup, Segment, Trajectory
from copris_lightning.datamodules.batches import BatchShape, divide
from copris_lightning.errors import ConfigurationError
from copris_lightning.module import CoprisModule


@pytest.fixture(scope="module")
def module(tiny_checkpoint: Path) -> CoprisModule:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rounding differs with the number of threads, and it is faster here
    module = CoprisModule(str(tiny_checkpoint), logprob_chunk_tokens=7)
    module.configure_model()
    yield module
    torch.set_num_threads(threads)


def trajectory(rng: random.Random, group: int, sample: int) -> Trajectory:
    segments = []
    for version in range(rng.randint(1, 3)):
        n = rng.randint(1, 9)
        values = [rng.uniform(-6, -3) for _ in range(n)]
        # Token 0 is the padding token: it must count like any other.
        segments.append(Segment(version, [rng.randrange(98) for _ in range(n)], values, values))
    prompt = tuple(rng.randrange(98) for _ in range(rng.randint(1, 6)))
    length = sum(len(s) for s in segments)
    made = Trajectory(group, sample, f"p{group}", prompt, length, segments, "stop", rng.random())
    made.advantage = rng.uniform(-2, 2)
    return made


def groups(seed: int, count: int = 4) -> list[PromptGroup]:
    rng = random.Random(seed)
    return [PromptGroup(g, g, [trajectory(rng, g, i) for i in range(2)], 0) for g in range(count)]


def test_logprobs_equal_a_row_by_row_reference_and_ignore_padding(module: CoprisModule) -> None:
    rows = [t for group in groups(0) for t in group.trajectories]
    batch = collate(rows, source="engine", temperature=0.7)
    ours = module.score(batch)
    for row, t in zip(ours, rows, strict=True):
        tokens = [*t.prompt_token_ids, *t.response_token_ids]
        expected = reference_logprobs(module.policy, tokens, len(t.prompt_token_ids), 0.7)
        assert (row[: t.response_length] - expected).abs().max() < 1e-5
        assert (row[t.response_length :] == 0).all()


def gradients(module: CoprisModule, batches: list[Any], world: int, steps: int) -> torch.Tensor:
    """What an optimizer would see: Lightning averages over micro-batches, strategies over ranks."""
    module.zero_grad()
    module.trainer = SimpleNamespace(accumulate_grad_batches=steps, world_size=world)
    for batch in batches:
        batch.is_last = False  # nothing to log here
        (module.training_step(batch, 0)["loss"] / (steps * world)).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 10**6), world=st.integers(1, 3), steps=st.integers(1, 2))
def test_gradients_do_not_depend_on_the_split(
    module: CoprisModule, seed: int, world: int, steps: int
) -> None:
    options: dict[str, Any] = {
        "source": "engine",
        "policy_version": 3,
        "temperature": 1.0,
        "metrics": {},
        "seed": 0,
    }
    whole = divide(groups(seed), BatchShape(1, 1, 1, 64), **options)
    split = divide(groups(seed), BatchShape(world, 1, steps, 64), **options)
    expected = gradients(module, whole[0], 1, 1)
    ours = gradients(module, [b for rank in split for b in rank], world, steps)
    assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_the_loss_of_a_padding_token_is_nothing_and_that_of_a_stop_token_is_not(
    module: CoprisModule,
) -> None:
    """With a stop token that is also the padding token, masks made from ids would lose it."""
    one = Trajectory(0, 0, "p", (5, 6), 3, [Segment(0, [7, 8, 0], [-4.0] * 3)], "stop", 1.0, 1.0)
    module.zero_grad()
    total, parts = module.policy_loss(collate([one], source="engine"))
    assert (parts.loss != 0).all()
    shortened = collate([one], source="engine")
    shortened.response_lengths -= 1
    assert module.policy_loss(shortened)[0] != total


def test_named_weights_are_the_checkpoints_with_tied_ones_once(module: CoprisModule) -> None:
    from safetensors import safe_open

    names = [name for name, _ in module.named_weights()]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
    with safe_open(Path(module.model) / "model.safetensors", framework="pt") as file:
        assert set(names) == set(file.keys())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprob_chunk_tokens": 0}, "logprob_chunk_tokens=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"model": "/nowhere"}, "model.init_args.model='/nowhere'"),
    ],
)
def test_settings_that_cannot_work_are_named(
    tiny_checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CoprisModule(**{"model": str(tiny_checkpoint), **change})


def test_a_model_that_changes_its_logits_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_checkpoint)
    config.final_logit_softcapping = 30.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"final_logit_softcapping=30\.0"):
        CoprisModule(str(tmp_path))
