"""Behaviour log-probs the paper's way: recomputed by the trainer before its weights change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from copris_lightning.core.batching import collate, split_by_tokens
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.datamodules.batches import sequence_length
from copris_lightning.datamodules.exchange import Exchange


def score_behavior(
    trainer: L.Trainer,
    trajectories: Sequence[Trajectory] | None,
    exchange: Exchange,
    *,
    temperature: float,
    max_tokens: int,
) -> None:
    """Fill in the trainer's log-probs of every token that has none yet.

    Called at the end of a stage: the weights in the trainer are still those that made these
    tokens. The forward passes are spread over the ranks.

    Args:
        trainer: holds the module, whose ``score(MicroBatch)`` gives ``[B, R]``.
        trajectories: rank 0's; those without new tokens are passed over. Others give ``None``.
        exchange: between ranks.
        temperature: of the distribution sampled from.
        max_tokens: padded tokens per forward pass.
    """
    new = [t for t in trajectories or () if t.unscored_tokens()]
    runs = split_by_tokens([sequence_length(t) for t in new], max_tokens)
    shares = None
    if trajectories is not None:
        batches = [
            collate([new[i] for i in run], source=None, temperature=temperature) for run in runs
        ]
        shares = [batches[rank :: exchange.world_size] for rank in range(exchange.world_size)]
    module: Any = trainer.lightning_module
    scored = []
    for batch in exchange.scatter(shares):
        batch = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.train_step_context():
            logprobs = module.score(batch).float().cpu()
        lengths = batch.response_lengths.tolist()
        scored.append([row[:n].tolist() for row, n in zip(logprobs, lengths, strict=True)])
    gathered = exchange.gather(scored)
    if gathered is None:
        return
    for i, run in enumerate(runs):
        rows = gathered[i % exchange.world_size][i // exchange.world_size]
        for j, row in zip(run, rows, strict=True):
            new[j].set_trainer_logprobs(row)
