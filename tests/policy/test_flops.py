"""What passes cost, against PyTorch's own count, and which devices' peaks are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_architecture
from builders import small_module
from torch.utils.flop_counter import FlopCounterMode
from trajectories import trajectory

from copris_lightning import LoRA
from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.policy.flops import ModelCost, Work, device_peak, peak_flops


def counted(module: Any, batch: MicroBatch, *, backward: bool) -> int:
    """As PyTorch counts matrix products."""
    with FlopCounterMode(display=False) as counter:
        logprobs = module(batch)
        if backward:
            logprobs.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", ["tied", "untied", "adapters"])
def test_the_formula_agrees_with_what_pytorch_counts(
    model: str, tiny_checkpoint: Path, untied_checkpoint: Path
) -> None:
    checkpoint = untied_checkpoint if model == "untied" else tiny_checkpoint
    lora = LoRA(rank=4, alpha=8.0) if model == "adapters" else None
    module = small_module(checkpoint, attn_implementation="eager", lora=lora)
    module.configure_model()
    rows = [trajectory((0, [5] * 60, [0.0] * 60), sample=i) for i in range(3)]
    batch, work = collate(rows, source=None), Work()
    for row in rows:
        work.add(len(row.prompt) + row.response_length, row.response_length)
    cost = ModelCost.of(module)
    assert cost is not None
    # Eager attention computes what the causal mask takes away, too.
    masked = 2 * cost.attention * work.squares
    passes = counted(module, batch, backward=False), counted(module, batch, backward=True)
    assert passes[0] == pytest.approx(cost.forward(work) + masked, rel=0.01)
    assert passes[1] == pytest.approx(cost.training(work) + 3 * masked, rel=0.02)


def test_all_weights_trained_cost_three_forward_passes(tiny_checkpoint: Path) -> None:
    cost = ModelCost.of(small_module(tiny_checkpoint))
    work = Work(tokens=100, responses=60, squares=10_000)
    assert cost is not None
    assert cost.training(work) == 3 * cost.forward(work)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_have_no_formula(model_type: str, tmp_path: Path) -> None:
    assert ModelCost.of(small_module(tiny_architecture(model_type, tmp_path))) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_a_peak_is_known_by_the_name_that_drivers_give(name: str, tera: float) -> None:
    assert peak_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 D", "NVIDIA Tesla V100", "cpu"],
)
def test_a_part_or_a_stranger_has_none(name: str) -> None:
    assert peak_flops(name) is None


def test_a_cpu_has_none() -> None:
    assert device_peak(torch.device("cpu")) is None
