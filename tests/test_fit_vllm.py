"""`fit` on the real engine: policy versions, importance ratios, and syncs that go wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from copris_testing import StaleHeadEngine, reference_logprobs
from transformers import AutoModelForCausalLM
from vllm_fits import FEW, fit

from copris_lightning import (
    VLLMEngine,
)
from copris_lightning.core.estimator.corrections import Truncation
from copris_lightning.errors import WeightSyncError


@pytest.mark.boots(1)
def test_each_segment_bears_the_logprobs_of_the_very_weights_of_its_version(
    tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path
) -> None:
    engine = VLLMEngine(cpu_engine_args)
    measured = [Truncation(apply=False)]  # asks for the engine's log-probs, too
    trainer, recorder = fit(
        tiny_checkpoint, engine, tmp_path, lr=0.3, steps=6, corrections=measured, **FEW
    )
    models = {}
    for version, weights in recorder.weights.items():
        models[version] = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32")
        models[version].load_state_dict(weights)
    assert len(models) == 6

    rows = [t for groups in recorder.batches for g in groups for t in g.trajectories]
    mixed = 0
    other_version = 0.0
    for trajectory in rows:
        tokens = trajectory.sequence.tolist()
        columns = {s: torch.tensor(c) for s, c in trajectory.logprobs.items()}
        start = prompt = len(trajectory.prompt)
        mixed += len(trajectory.segments) > 1
        for segment in trajectory.segments:
            ours = reference_logprobs(models[segment.version], tokens, start, 0.8)
            ours = ours[: segment.length]
            place = slice(start - prompt, start - prompt + segment.length)
            assert (ours - columns["engine"][place]).abs().max() < 1e-4
            assert (ours - columns["trainer"][place]).abs().max() < 1e-5
            others = reference_logprobs(models[(segment.version + 3) % 6], tokens, start, 0.8)
            difference = (others[: segment.length] - columns["engine"][place]).abs().max()
            other_version = max(other_version, float(difference))
            start += segment.length
    assert mixed
    # Had the versions been mixed up, it would show.
    assert other_version > 1e-2

    ledger = sorted((Path(trainer.log_dir or "") / "ledger").iterdir())
    records = [json.loads(line) for file in ledger for line in file.read_text().splitlines()]
    assert [r["prompt_id"] for r in records] == [t.prompt_id for t in rows]
    assert all(sum(s["tokens"] for s in r["segments"]) == r["response_tokens"] for r in records)


@pytest.mark.engines
@pytest.mark.parametrize("source", ["engine", "trainer"])
def test_with_learning_rate_zero_every_importance_ratio_is_one(
    tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path, source: str
) -> None:
    engine = VLLMEngine(cpu_engine_args)
    settings = {"behavior_logprobs": source, **FEW}
    _, recorder = fit(tiny_checkpoint, engine, tmp_path, lr=0.0, steps=5, **settings)
    rows = [t for groups in recorder.batches for g in groups for t in g.trajectories]
    assert any(len(t.segments) > 1 for t in rows)
    assert max(s.version for t in rows for s in t.segments) >= 3
    ratios = torch.cat(recorder.ratios)
    assert len(ratios) > 1000
    assert (ratios - 1).abs().max() < 1e-4
    # Nobody asked for both log-probs.
    assert {name for t in rows for name in t.logprobs} == {source}
    assert not recorder.mismatch


@pytest.mark.engines
def test_a_stale_head_stops_the_run_and_is_named_however_small_the_step(
    tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path
) -> None:
    engine = StaleHeadEngine(cpu_engine_args)
    with pytest.raises(WeightSyncError) as error:
        # Log-probs change by less than what engine and trainer differ by anyway.
        fit(tiny_checkpoint, engine, tmp_path, lr=1e-5, steps=3)
    assert str(error.value) == (
        "the weights did not arrive in the engine: it does not compute with what was sent for "
        "lm_head.weight"
    )
