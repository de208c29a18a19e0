"""The LightningModule: log-probs, the scaled loss, and gradients under any split."""

from __future__ import annotations

import random
import re
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trajectories
from builders import small_module
from copris_testing import reference_logprobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import SingleDeviceStrategy

from copris_lightning.core.batching import collate
from copris_lightning.core.estimator.corrections import Masking, Truncation
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.normalization import NORMALIZATIONS, UpdateTotals
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.core.outcome import Credit
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.datamodules.divide import BatchShape, divide
from copris_lightning.errors import ConfigurationError, QuarantineError
from copris_lightning.policy.module import CoprisModule


@pytest.fixture(scope="module")
def module(tiny_checkpoint: Path) -> CoprisModule:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # rounding differs with the number of threads, and it is faster here
    module = small_module(tiny_checkpoint, logprob_chunk_tokens=7)
    module.configure_model()
    module.policy.pack(module.policy.ask)
    assert module.policy.packs
    yield module
    torch.set_num_threads(threads)


def trajectory(rng: random.Random, group: int, sample: int) -> Trajectory:
    chunks = []
    for version in range(rng.randint(1, 3)):
        n = rng.randint(1, 9)
        values = [rng.uniform(-6, -3) for _ in range(n)]
        # Token 0 is the padding token: it must count like any other.
        chunks.append((version, [rng.randrange(98) for _ in range(n)], values))
    prompt = tuple(rng.randrange(98) for _ in range(rng.randint(1, 6)))
    return trajectories.trajectory(
        *chunks,
        group=group,
        sample=sample,
        prompt=prompt,
        trainer=[value for _, _, values in chunks for value in values],
        reward=rng.random(),
        advantage=rng.uniform(-2, 2),
    )


def groups(seed: int, count: int = 4) -> list[PromptGroup]:
    rng = random.Random(seed)
    return [PromptGroup(g, g, [trajectory(rng, g, i) for i in range(2)], 0) for g in range(count)]


def test_logprobs_equal_a_row_by_row_reference_and_ignore_padding(module: CoprisModule) -> None:
    rows = [t for group in groups(0) for t in group.trajectories]
    batch = collate(rows, source="engine", sampling=Sampling(0.7))
    with torch.no_grad():
        ours = module(batch)
    for row, t in zip(ours, rows, strict=True):
        tokens = t.sequence.tolist()
        expected = reference_logprobs(module.policy.model, tokens, len(t.prompt), 0.7)
        assert (row[: t.response_length] - expected).abs().max() < 1e-5
        assert (row[t.response_length :] == 0).all()


def trainer(world: int = 1, steps: int = 1) -> Any:
    strategy = SingleDeviceStrategy("cpu")
    return SimpleNamespace(
        strategy=strategy, accumulate_grad_batches=steps, world_size=world, global_step=0
    )


def gradients(module: CoprisModule, batches: list[Any], world: int, steps: int) -> torch.Tensor:
    """What an optimizer would see: Lightning averages over micro-batches, strategies over ranks."""
    module.zero_grad()
    module.trainer = trainer(world, steps)
    for batch in batches:
        batch.is_last = False  # nothing to log here
        (module.training_step(batch, 0)["loss"] / (steps * world)).backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10**6),
    world=st.integers(1, 3),
    steps=st.integers(1, 2),
    packed=st.booleans(),
    normalization=st.sampled_from(sorted(NORMALIZATIONS)),
)
def test_gradients_depend_neither_on_the_split_nor_on_packing(
    module: CoprisModule, seed: int, world: int, steps: int, packed: bool, normalization: str
) -> None:
    module.estimator = Estimator(normalization=normalization)
    options: dict[str, Any] = {
        "source": "engine",
        "policy_version": 3,
        "sampling": Sampling(max_new_tokens=40),
        "metrics": {},
        "seed": 0,
    }
    whole = divide(groups(seed), BatchShape(1, 1, 1, 64), **options)
    split = divide(groups(seed), BatchShape(world, 1, steps, 64, packed), **options)
    module.policy.packs = False
    expected = gradients(module, whole[0], 1, 1)
    module.policy.packs = packed
    micro_batches = [b for rank in split for b in rank]
    ours = gradients(module, micro_batches, world, steps)
    # What is added up may nearly cancel: rounding is relative to the parts.
    scale = sum(gradients(module, [b], 1, 1).norm() for b in micro_batches)
    module.estimator, module.policy.packs = Estimator(), True
    assert (ours - expected).norm() <= 1e-6 * scale


def test_a_trajectory_whose_logprobs_are_not_finite_is_left_out_of_the_gradient(
    module: CoprisModule,
) -> None:
    rows = [t for group in groups(3) for t in group.trajectories][:4]
    for row in rows:
        row.prompt = tuple(1 + token % 90 for token in row.prompt)
        row.tokens = array("i", [1 + token % 90 for token in row.tokens])
    poison, totals = 97, UpdateTotals(4, 60, 40)
    rows[2].prompt = (5, poison)
    module.trainer = trainer()
    embedding = module.policy.model.get_input_embeddings().weight
    original = embedding.detach().clone()
    tied_head = module.policy.model.get_output_embeddings()

    def gradient(batch: Any) -> Any:
        module.zero_grad()
        output = module.training_step(batch, 0)
        output["loss"].backward()
        return output, torch.cat([p.grad.flatten() for p in module.parameters()])

    clean = [rows[0], rows[1], rows[3]]
    _, expected = gradient(collate(clean, source="engine", totals=totals))
    try:
        with torch.no_grad():
            embedding[poison] = torch.nan
        broken = collate(rows, source="engine", totals=totals, quarantine_limit=4)
        # The head is tied, so its logit is NaN everywhere: no input is left to train on.
        with (
            pytest.warns(UserWarning, match=re.escape(rows[0].name)),
            pytest.raises(QuarantineError, match=r"for any input.*precision\.dtype=float32"),
        ):
            module.training_step(broken, 0)
        # Only as an input this time: the head is untied.
        head = torch.nn.Linear(*original.T.shape, bias=False)
        head.weight = torch.nn.Parameter(original.clone())
        module.policy.model.set_output_embeddings(head)
        # All of the micro-batch is left out: a gradient of zero, for every parameter.
        module.setup("fit")
        alone = collate(rows[2:3], source="engine", totals=totals, quarantine_limit=1)
        with pytest.warns(UserWarning, match=re.escape(rows[2].name)):
            output, ours = gradient(alone)
        assert output["quarantined"] == [rows[2].name]
        assert output["loss"] == 0.0
        assert not output["estimate"].mask.any()
        assert torch.equal(ours, torch.zeros_like(ours))
        # Once more is past the limit.
        with pytest.raises(QuarantineError, match="max_quarantined allows 1"):
            module.training_step(alone, 0)
        # The others of a micro-batch are trained on.
        module.setup("fit")
        with pytest.warns(UserWarning, match=re.escape(rows[2].name)):
            output, ours = gradient(broken)
        assert output["quarantined"] == [rows[2].name]
        assert torch.isfinite(ours).all()
        clean_again, _ = gradient(collate(clean, source="engine", totals=totals))
        assert output["loss"] == clean_again["loss"]
    finally:
        with torch.no_grad():
            embedding.copy_(original)
        module.policy.model.set_output_embeddings(tied_head)
        module.setup("fit")
    _, restored = gradient(collate(clean, source="engine", totals=totals))
    assert torch.equal(restored, expected)


def test_a_penalty_towards_the_reference_pulls_back_to_it(tiny_checkpoint: Path) -> None:
    """At the reference the penalty and its gradient are zero; away from it they are not."""
    penalized = small_module(tiny_checkpoint, kl=KLPenalty(0.5, "k3"))
    penalized.configure_model()
    penalized.on_fit_start()
    rows = [t for group in groups(4) for t in group.trajectories]
    for row in rows:
        row.credit = Credit(0.0)
    batch = collate(rows, source="engine", totals=UpdateTotals(8, 100, 40))

    def step() -> tuple[float, float]:
        penalized.zero_grad()
        loss, _ = penalized.policy_loss(batch, penalized.token_terms(batch))
        loss.backward()
        norms = [p.grad.norm() for p in penalized.parameters() if p.grad is not None]
        return float(loss.detach()), float(torch.stack(norms).norm())

    assert step() == (0.0, 0.0)
    with torch.no_grad():
        for parameter in penalized.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    loss, norm = step()
    assert loss > 0
    assert norm > 0
    names = [name for name, _ in penalized.named_parameters()]
    assert len(names) == len([name for name, _ in penalized.named_weights()])  # none of its own


def test_an_entropy_bonus_raises_the_entropy(tiny_checkpoint: Path) -> None:
    rewarded = small_module(tiny_checkpoint, entropy_coefficient=1.0)
    rewarded.configure_model()
    with torch.no_grad():
        for parameter in rewarded.parameters():
            parameter.mul_(3.0)
    rows = [t for group in groups(5) for t in group.trajectories]
    for row in rows:
        row.credit = Credit(0.0)
    batch = collate(rows, source="engine", totals=UpdateTotals(8, 100, 40))
    optimizer = torch.optim.SGD(rewarded.parameters(), lr=0.05)
    entropies = []
    for _ in range(5):
        optimizer.zero_grad()
        loss, parts = rewarded.policy_loss(batch, rewarded.token_terms(batch))
        loss.backward()
        optimizer.step()
        entropies.append(float(parts.entropy[parts.mask].mean()))
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 1e-4


def test_the_loss_of_a_padding_token_is_nothing_and_that_of_a_stop_token_is_not(
    module: CoprisModule,
) -> None:
    """With a stop token that is also the padding token, masks made from ids would lose it."""
    one = trajectories.trajectory((0, [7, 8, 0], [-4.0] * 3), prompt=(5, 6), advantage=1.0)
    module.zero_grad()
    batch = collate([one], source="engine", totals=UpdateTotals(1, 3, 3))
    total, parts = module.policy_loss(batch, module.token_terms(batch))
    assert (parts.loss != 0).all()
    batch.written[:, -1] = False
    assert module.policy_loss(batch, module.token_terms(batch))[0] != total


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
        ({"normalization": "mean"}, "normalization='mean'"),
        ({"entropy_coefficient": -1.0}, "^entropy_coefficient=-1.0"),
        ({"kl": KLPenalty(reference="/nowhere")}, "^estimator.kl.reference='/nowhere'"),
        (
            {"corrections": [Truncation(), Masking(reweigh=True)]},
            "^corrections: truncation_token and masking_mismatch_token",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(
    tiny_checkpoint: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        small_module(tiny_checkpoint, **change)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^model='/nowhere'"):
        CoprisModule("/nowhere")


def test_a_model_that_changes_its_logits_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_checkpoint)
    config.final_logit_softcapping = 30.0
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"final_logit_softcapping=30\.0"):
        CoprisModule(str(tmp_path))
