"""Scores of an evaluation: k samples of each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class EvaluationBatch:
    """Some evaluated prompts.

    Attributes:
        rewards: ``[P, k]``, P prompts with k samples each.
        response_lengths: ``[P, k]``, in tokens.
        name: of the evaluation.
        pass_threshold: a sample passes with at least this reward.
        records: one plain dict per sample, as in the ledger.
    """

    rewards: Tensor
    response_lengths: Tensor
    name: str
    pass_threshold: float = 1.0
    records: list[dict[str, Any]] = field(default_factory=list)


def avg_at_k(rewards: Tensor) -> Tensor:
    """Mean reward of each prompt over its k samples: ``[P, k]`` to ``[P]``."""
    return rewards.float().mean(dim=1)


def pass_at_k(rewards: Tensor, threshold: float = 1.0) -> Tensor:
    """Whether any of a prompt's k samples passes: ``[P, k]`` to 0 or 1, ``[P]``.

    Args:
        rewards: ``[P, k]``.
        threshold: a sample passes with a reward of at least this.
    """
    return (rewards >= threshold).any(dim=1).float()
