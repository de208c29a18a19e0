"""Packed passes give the log-probs and gradients of padded ones, or are not made."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, tiny_architecture
from builders import small_module
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, Lfm2Config, Lfm2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.packing import obstacle, packs_as_it_pads
from copris_lightning.policy.policy import Policy
from copris_lightning.policy.pretrained import load_model

LENGTHS = (3, 40, 11, 1, 25)
"""Tokens of the responses."""
PADDED_ONLY = {"opt": "change each other's log-probs", "gpt_oss": "implementation=eager is neither"}
"""Architectures that cannot be packed, and what the warning says."""


@pytest.fixture(autouse=True)
def one_torch_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trajectories(seed: int = 0) -> list[Trajectory]:
    """Few token ids, with that of padding among them."""
    rng, rows = random.Random(seed), []
    for i, length in enumerate(LENGTHS):
        prompt = tuple(rng.randrange(90) for _ in range(rng.randint(1, 6)))
        rows.append(Trajectory(i, 0, "p", prompt, 99))
        rows[-1].append([rng.randrange(90) for _ in range(length)], None, 0)
    return rows


def policy_of(checkpoint: Path, attention: str = "sdpa", dtype: str = "float32") -> Policy:
    model = load_model(str(checkpoint), dtype=dtype, attn_implementation=attention)
    return Policy(model.train(), chunk_tokens=64)


def answers(policy: Policy, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of a sum of them in which no two can be swapped."""
    policy.zero_grad()
    logprobs, _ = policy(batch)
    weights = torch.linspace(0.5, 1.5, logprobs.numel()).view_as(logprobs)
    (logprobs * weights).sum().backward()
    gradient = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    return logprobs.detach(), torch.cat(gradient)


def packed(policy: Policy) -> Policy:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.pack(policy.ask)
    assert policy.packs
    return policy


@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in PADDED_ONLY])
def test_every_architecture_computes_the_same_on_packed_sequences(
    model_type: str, tmp_path: Path
) -> None:
    window = {"sliding_window": 5} if model_type in ("mistral", "gemma3_text") else {}
    policy = policy_of(tiny_architecture(model_type, tmp_path, **window))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.4)  # as large as they are made, rounding grows from layer to layer
    batch = collate(trajectories(), source=None)
    logprobs, gradient = answers(policy, batch)
    packed(packed(policy))  # a second fit looks again
    for is_checkpointed in (False, True):
        if is_checkpointed:
            policy.model.gradient_checkpointing_enable()
        found = answers(policy, batch)
        assert (found[0] - logprobs).abs().max() < 2e-6
        assert (found[1] - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("model_type", PADDED_ONLY)
def test_a_model_that_computes_otherwise_on_packed_sequences_is_padded_and_says_so(
    model_type: str, tmp_path: Path
) -> None:
    attention = "eager" if model_type == "gpt_oss" else "sdpa"
    policy = policy_of(tiny_architecture(model_type, tmp_path), attention)
    batch = collate(trajectories(), source=None)
    expected, _ = answers(policy, batch)
    with pytest.warns(UserWarning, match=rf"memory\.packing: .*{PADDED_ONLY[model_type]}"):
        policy.pack(policy.ask)
    assert not policy.packs
    assert torch.equal(answers(policy, batch)[0], expected)


def short_convolutions() -> Lfm2ForCausalLM:
    """A model of attention and short convolutions, which reach over from the last sequence."""
    config = Lfm2Config(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        layer_types=["full_attention", "conv"],
    )
    torch.manual_seed(0)
    return Lfm2ForCausalLM(config)


def test_layers_that_go_on_into_the_next_sequence_are_known_by_name_and_found_by_looking() -> None:
    policy = Policy(short_convolutions(), chunk_tokens=64)
    assert "other kinds than attention (conv)" in str(obstacle(policy.model))

    def ask(packs: bool, batch: MicroBatch) -> Tensor:
        policy.packs = packs
        return policy.ask(batch)

    # As if its config named nothing.
    assert not packs_as_it_pads(lambda b: ask(False, b), lambda b: ask(True, b), 90)
    policy.model.config.layer_types = ["full_attention", "full_attention"]
    assert obstacle(policy.model) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_not_taken_for_a_difference(dtype: str, tmp_path: Path) -> None:
    packed(policy_of(tiny_architecture("qwen3", tmp_path), dtype=dtype))


def test_packing_switched_off_pads(tiny_checkpoint: Path) -> None:
    module = small_module(tiny_checkpoint, packing=False)
    module.configure_model()
    module.pack()
    assert not module.policy.packs


class AttentionShapes(TorchFunctionMode):
    """Notes how many queries and keys each call of SDPA has."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.shapes.append((args[0].shape[2], args[1].shape[2]))
        return func(*args, **(kwargs or {}))


def test_no_token_pays_for_another_sequence_nor_for_padding(tiny_checkpoint: Path) -> None:
    policy = packed(policy_of(tiny_checkpoint))
    batch = collate(trajectories(), source=None)
    tokens = []
    policy.model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: tokens.append(tuple(args[0].shape))
    )
    with AttentionShapes() as seen:
        policy.ask(batch)
    lengths = batch.lengths.tolist()
    layers = policy.model.config.num_hidden_layers
    assert tokens == [(1, sum(lengths))]
    assert seen.shapes == [(n, n) for n in lengths] * layers


def test_a_sequence_whose_numbers_are_none_spoils_no_other(tiny_checkpoint: Path) -> None:
    policy = packed(policy_of(tiny_checkpoint))
    poison = 95
    rows = trajectories()
    expected = policy.ask(collate(rows, source=None))
    head = torch.nn.Linear(*policy.model.lm_head.weight.T.shape, bias=False)
    head.weight.data.copy_(policy.model.lm_head.weight)
    policy.model.set_output_embeddings(head)  # it was tied to what is spoiled now
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[poison] = torch.nan
    rows[1].prompt = (poison, *rows[1].prompt[1:])
    found = policy.ask(collate(rows, source=None))
    others = [0, 2, 3, 4]
    assert found[1, : LENGTHS[1]].isnan().all()
    assert torch.equal(found[others], expected[others])


def by_bounds(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """What FlashAttention computes of the lengths that it is handed."""
    assert mask is None
    bounds, longest = options.pop("cu_seq_lens_q"), options.pop("max_length_q")
    assert torch.equal(bounds, options.pop("cu_seq_lens_k"))
    assert longest == options.pop("max_length_k")
    sizes = bounds.diff().tolist()
    assert (bounds.dtype, int(bounds[0]), max(sizes)) == (torch.int32, 0, longest)
    parts: Sequence[Any] = [tensor.split(sizes, dim=2) for tensor in (query, key, value)]
    outputs = [
        sdpa_attention_forward(module, *p, None, **options)[0] for p in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2", "mixtral"])
def test_flash_attention_is_handed_the_lengths_of_the_sequences(
    model_type: str, tmp_path: Path
) -> None:
    AttentionInterface.register("flash_by_hand", by_bounds)
    AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)
    policy = policy_of(tiny_architecture(model_type, tmp_path))
    batch = collate(trajectories(), source=None)
    expected = policy.ask(batch)
    # As transformers sets it, once it has loaded the kernels of what is called flash.
    policy.model.config._attn_implementation = "flash_by_hand"
    assert obstacle(policy.model) is None
    policy.packs = True
    assert (policy.ask(batch) - expected).abs().max() < 2e-5


def test_ligers_kernels_are_refused_where_they_cannot_run(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^precision\.liger=true"):
        small_module(tiny_checkpoint, liger=True)
