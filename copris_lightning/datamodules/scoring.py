"""Log-probs that the trainer computes before its weights change: the behaviour's, the paper's way,
and the proximal policy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.packing import pack
from copris_lightning.core.partition import cut_by_length
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.datamodules.divide import sequence_length
from copris_lightning.datamodules.ranks import Ranks
from copris_lightning.policy.sharding import score


def score_behavior(
    trainer: L.Trainer,
    trajectories: Sequence[Trajectory] | None,
    ranks: Ranks,
    *,
    sampling: Sampling,
    max_tokens: int,
) -> None:
    """Fill in the trainer's log-probs of every token that has none yet.

    Called at the end of a stage: the weights in the trainer are still those that made these
    tokens. The forward passes are spread over the ranks.

    Args:
        trainer: holds the policy; see :func:`copris_lightning.policy.sharding.score`.
        trajectories: rank 0's; those without new tokens are passed over. Others give ``None``.
        ranks: all of them.
        sampling: how the tokens were drawn.
        max_tokens: per forward pass, padding included.
    """
    new = [t for t in trajectories or () if t.missing("trainer")]
    scores = _forward(
        trainer,
        None if trajectories is None else new,
        ranks,
        sampling=sampling,
        max_tokens=max_tokens,
    )
    for trajectory, values in zip(new, scores, strict=True):
        trajectory.add_logprobs("trainer", values)


def score_proximal(
    trainer: L.Trainer,
    trajectories: Sequence[Trajectory] | None,
    ranks: Ranks,
    *,
    sampling: Sampling,
    max_tokens: int,
) -> None:
    """Fill in the log-probs of all tokens under the weights that training starts from now.

    Arguments as :func:`score_behavior`.
    """
    scores = _forward(trainer, trajectories, ranks, sampling=sampling, max_tokens=max_tokens)
    for trajectory, values in zip(trajectories or (), scores, strict=True):
        trajectory.add_logprobs("proximal", values)


def _forward(
    trainer: L.Trainer,
    rows: Sequence[Trajectory] | None,
    ranks: Ranks,
    *,
    sampling: Sampling,
    max_tokens: int,
) -> list[list[float]]:
    """The trainer's log-probs of each response, on rank 0; the others help and get nothing."""
    runs = _passes(trainer, [sequence_length(t) for t in rows or ()], max_tokens, ranks.size)

    def shares() -> list[list[MicroBatch]]:
        assert rows is not None
        batches = [collate([rows[i] for i in run], source=None, sampling=sampling) for run in runs]
        # Each rank computes equally often: with split weights they can only do it together.
        while len(batches) % ranks.size:
            batches.append(batches[0].placeholder())
        return [batches[rank :: ranks.size] for rank in range(ranks.size)]

    scored = []
    for batch in ranks.deal(shares):
        logprobs = score(trainer, batch)
        lengths = batch.response_lengths.tolist()
        scored.append([row[:n].tolist() for row, n in zip(logprobs, lengths, strict=True)])
    gathered = ranks.gather(scored)
    if gathered is None or rows is None:
        return []
    result: list[list[float]] = [[] for _ in rows]
    for i, run in enumerate(runs):
        part = gathered[i % ranks.size][i // ranks.size]
        for j, values in zip(run, part, strict=True):
            result[j] = values
    return result


def _passes(
    trainer: L.Trainer, lengths: Sequence[int], max_tokens: int, ranks: int
) -> list[list[int]]:
    module: Any = trainer.lightning_module
    if module.policy.packs:
        return pack(lengths, max_tokens, ranks)
    return cut_by_length(lengths, max_tokens)
