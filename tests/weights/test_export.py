"""The engine gets what ``save_pretrained`` would write, whatever transformers makes of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, tiny_architecture
from safetensors.torch import load_file
from torch import Tensor
from transformers.core_model_loading import Chunk, WeightConverter

from copris_lightning import CoprisModule
from copris_lightning.policy.lora import LoRA
from copris_lightning.policy.pretrained import load_model
from copris_lightning.weights.export import as_saved


def fleeting(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights that are gone when the next is asked for, as while split ones are put together."""
    for name, tensor in weights:
        buffer = tensor.clone()
        yield name, buffer
        buffer.fill_(torch.nan)


def saved(model: object, directory: Path) -> dict[str, Tensor]:
    model.save_pretrained(directory)  # type: ignore[attr-defined]
    return load_file(directory / "model.safetensors")


def assert_same(sent: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(sent) == sorted(expected)
    for name, tensor in expected.items():
        assert sent[name].dtype == tensor.dtype, name
        assert torch.equal(sent[name], tensor), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_sent_is_what_would_be_saved(model_type: str, tmp_path: Path) -> None:
    checkpoint = tiny_architecture(model_type, tmp_path / "checkpoint")
    model = load_model(str(checkpoint), dtype="float32", attn_implementation="eager")
    module = CoprisModule.__new__(CoprisModule)
    torch.nn.Module.__init__(module)
    module.lora, module.policy = None, torch.nn.Module()
    module.policy.model = model
    with torch.no_grad():  # the file that it was loaded from would not do
        for tensor in model.state_dict().values():
            tensor.add_(torch.rand_like(tensor))
    sent = {name: tensor.clone() for name, tensor in module.named_weights()}
    assert_same(sent, saved(model, tmp_path / "saved"))
    # One after the other, in any order.
    reverse = reversed(list(model.named_parameters()))
    parameters = as_saved(model, fleeting([*reverse, *persistent_buffers(model)]))
    assert_same({name: tensor.clone() for name, tensor in parameters}, sent)


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    names = set(model.state_dict()) - {n for n, _ in model.named_parameters(remove_duplicate=False)}
    return [(name, model.get_buffer(name)) for name in names]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_merged_adapters_are_sent_under_the_checkpoints_names(
    model_type: str, tmp_path: Path
) -> None:
    checkpoint = tiny_architecture(model_type, tmp_path)
    module = CoprisModule(str(checkpoint), lora=LoRA(rank=2))
    module.configure_model()
    assert module.policy is not None
    before = load_file(checkpoint / "model.safetensors")
    assert_same({name: tensor.clone() for name, tensor in module.named_weights()}, before)
    attention = module.policy.model.get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        attention.lora_B.default.weight.fill_(0.5)  # type: ignore[union-attr, operator]
    after = dict(module.named_weights())
    changed = [name for name, tensor in before.items() if not torch.equal(after[name], tensor)]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]


def test_weights_that_are_saved_as_one_wait_for_each_other(tmp_path: Path) -> None:
    checkpoint = tiny_architecture("llama", tmp_path / "checkpoint", num_key_value_heads=2)
    model = load_model(str(checkpoint), dtype="float32", attn_implementation="eager")
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    model._weight_conversions = [WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)])]
    expected = saved(model, tmp_path / "saved")
    assert "model.layers.1.self_attn.qkv.weight" in expected
    sent = {n: t.clone() for n, t in as_saved(model, fleeting(model.named_parameters()))}
    assert_same(sent, expected)
    weights = [(n, p) for n, p in model.named_parameters() if "0.self_attn.v_proj" not in n]
    with pytest.raises(AssertionError, match=r"layers\.0\.self_attn\.qkv"):
        list(as_saved(model, weights))
