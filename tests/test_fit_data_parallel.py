"""`fit` on vLLM's data parallelism: two engine cores behind one engine, both synced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from builders import small_data, small_module
from copris_testing import SomePrompts, reference_logprobs
from lightning.pytorch.loggers import CSVLogger
from some_rewards import ShareOfDigits
from transformers import AutoModelForCausalLM

from copris_lightning import (
    StalenessMonitor,
    TrajectoryLedger,
    VLLMEngine,
    WeightSync,
)

SEQUENCE = list(range(2, 40))


async def score_on(engine: VLLMEngine, rank: int) -> list[float]:
    """Log-probs by one rank's engine core, which vLLM would choose by load."""
    from vllm.inputs import tokens_input
    from vllm.sampling_params import SamplingParams

    assert engine._llm is not None
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = engine._llm.generate(
        tokens_input(SEQUENCE), params, f"rank-{rank}", data_parallel_rank=rank
    )
    async for output in outputs:
        entries: Any = output.prompt_logprobs
    return [entries[i][SEQUENCE[i]].logprob for i in range(1, len(SEQUENCE))]


class RankProbe(L.Callback):
    """Compares each rank's log-probs with the trainer's after every sync."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.differences: list[list[float]] = []
        self.changes: list[float] = []
        self.last = torch.zeros(len(SEQUENCE) - 1)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = trainer.datamodule
        self.model.load_state_dict(dict(pl_module.named_weights()), strict=False)
        expected = reference_logprobs(self.model, SEQUENCE, 1)
        theirs = [data.session.call(score_on(data.engine, rank)) for rank in (0, 1)]
        self.differences.append([float((expected - torch.tensor(t)).abs().max()) for t in theirs])
        self.changes.append(float((expected - self.last).abs().max()))
        self.last = expected


@pytest.mark.engines
def test_a_staged_run_syncs_every_rank(
    tiny_checkpoint: Path, cpu_engine_args: dict[str, Any], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    engine = VLLMEngine({**cpu_engine_args, "data_parallel_size": 2})
    sync, probe = WeightSync(parity_sequences=8), RankProbe(model)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[sync, StalenessMonitor(), TrajectoryLedger(), probe],
    )
    data = small_data(
        tiny_checkpoint, engine, prompts=SomePrompts(), reward=ShareOfDigits(), cap=20
    )
    module = small_module(tiny_checkpoint, lr=2.0)
    trainer.fit(module, datamodule=data)
    assert sync.version == 3
    assert sync.worst_parity < 1e-4
    assert len(probe.differences) == 3
    assert max(max(pair) for pair in probe.differences) < 1e-4
    # The weights did change in between.
    assert min(probe.changes) > 1e-2
    assert float(trainer.callback_metrics["staleness/lag_max"]) > 0
