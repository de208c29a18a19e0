"""`fit` on the real engine while it streams, or keeps keys and values over syncs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from vllm_fits import FEW, fit

from copris_lightning import VLLMEngine
from copris_lightning.core.trajectory import Trajectory

TEMPERATURE = 0.8
FLOWS = [
    pytest.param("streaming", "kept", marks=pytest.mark.boots(1)),
    pytest.param("streaming", "fresh", marks=pytest.mark.engines),
    pytest.param("staged", "kept", marks=pytest.mark.engines),
]


@pytest.mark.parametrize(("mode", "kv"), FLOWS)
def test_the_engines_logprobs_are_those_of_the_weights_and_the_keys_that_are_told(
    tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path, mode: str, kv: str
) -> None:
    engine = VLLMEngine(cpu_engine_args)
    settings = {**FEW, "mode": mode, "kv": kv}
    trainer, recorder = fit(tiny_checkpoint, engine, tmp_path, lr=0.3, steps=6, **settings)
    models = {}
    for version, weights in recorder.weights.items():
        models[version] = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
        models[version].load_state_dict(weights)
    delivered = list(enumerate(recorder.batches))
    rows = [(n, t) for n, groups in delivered for g in groups for t in g.trajectories]
    assert max(n - s.version for n, t in rows for s in t.segments) <= FEW["max_staleness"]
    assert any(len(t.segments) > 1 for _, t in rows)
    old_keys = kept_ones = other = 0.0
    for _, trajectory in rows:
        found = torch.tensor(trajectory.logprobs["engine"])
        assert (expected(models, trajectory) - found).abs().max() < 1e-4
        if any(s.kv_version < s.version for s in trajectory.segments):
            kept_ones += 1
            old_keys = max(old_keys, float((fresh(models, trajectory) - found).abs().max()))
        shifted = [
            (s.length, (s.version + 3) % 6, (s.version + 3) % 6) for s in trajectory.segments
        ]
        other = max(other, float((computed(models, trajectory, shifted) - found).abs().max()))
    assert other > 1e-2  # had the versions been mixed up, it would show
    assert (kept_ones > 0) == (kv == "kept")
    if kept_ones:  # and so it would if keys and values were not the old ones
        assert old_keys > 1e-3
    assert trainer.callback_metrics["staleness/kv_lag_mean"] >= 0


def expected(models: Mapping[int, Any], trajectory: Trajectory) -> torch.Tensor:
    """Log-probs with each segment's weights on the keys and values that it says."""
    segments = [(s.length, s.version, s.kv_version) for s in trajectory.segments]
    return computed(models, trajectory, segments)


def fresh(models: Mapping[int, Any], trajectory: Trajectory) -> torch.Tensor:
    """The same with keys and values of each segment's own weights."""
    segments = [(s.length, s.version, s.version) for s in trajectory.segments]
    return computed(models, trajectory, segments)


@torch.no_grad()
def computed(
    models: Mapping[int, Any], trajectory: Trajectory, segments: list[tuple[int, int, int]]
) -> torch.Tensor:
    """Log-probs of a response whose segments are of so many tokens, a version, and a version of
    keys and values. The last token before a segment is computed on with the segment's weights."""
    tokens, start = trajectory.sequence.tolist(), len(trajectory.prompt)
    cache, keys, cached = DynamicCache(), -1, 0
    found = []
    for length, version, kv_version in segments:
        if kv_version != keys:
            cache, keys, cached = DynamicCache(), kv_version, 0
        inputs = torch.tensor([tokens[cached : start + length - 1]])
        logits = models[version](inputs, past_key_values=cache).logits[0, -length:] / TEMPERATURE
        targets = torch.tensor(tokens[start : start + length])
        found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        cached = start + length - 1
        start += length
    return torch.cat(found)


@pytest.mark.engines
@pytest.mark.parametrize("mode", ["staged", "streaming"])
def test_with_learning_rate_zero_every_importance_ratio_is_one(
    tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path, mode: str
) -> None:
    engine = VLLMEngine(cpu_engine_args)
    settings = {**FEW, "mode": mode, "kv": "kept"}
    _, recorder = fit(tiny_checkpoint, engine, tmp_path, lr=0.0, steps=5, **settings)
    ratios = torch.cat(recorder.ratios)
    assert len(ratios) > 1000
    assert (ratios - 1).abs().max() < 1e-4
