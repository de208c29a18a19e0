"""From the rewards of a batch to its advantages: what counts, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from copris_lightning.core.estimator.advantage import soft_overlong_penalty
from copris_lightning.core.outcome import TRUNCATED, Excluded
from copris_lightning.core.outcome import Credit as Credited
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.datamodules.settings import Advantage, Credit
from copris_lightning.errors import ConfigurationError, QuarantineError


def quarantine(groups: Sequence[PromptGroup], max_share: float) -> None:
    """Exclude every trajectory without a reward, or with a log-prob that is not finite.

    Args:
        groups: the batch, scored.
        max_share: of its trajectories that may be excluded for this.

    Raises:
        QuarantineError: there are more; names them.
    """
    rows = [t for group in groups for t in group.trajectories]
    for trajectory in rows:
        fault = trajectory.fault()
        trajectory.credit = None if fault is None else Credited(0.0, Excluded(fault))
    broken = [t for t in rows if t.is_quarantined]
    if len(broken) > max_share * len(rows):
        shown = "; ".join(f"{t.name}: {t.fault()}" for t in broken[:3])
        raise QuarantineError(
            f"{len(broken)} of the batch's {len(rows)} trajectories are not finite, more than "
            f"credit.max_quarantined={max_share} allows ({shown}). A reward that is not a finite "
            "number comes from task.scoring.reward; log-probs come from the model's weights and "
            "precision. To resume with this batch, raise the share"
        )


def set_advantages(groups: Sequence[PromptGroup], credit: Credit, sampling: Sampling) -> None:
    """Fill in every trajectory's advantage from its group's rewards, and exclude truncated ones.

    Truncated responses are compared with their group like the others even where they are not
    trained on themselves. Quarantined ones are not: the rest of their group is compared without
    them, and a single one that is left has nothing to be compared with and gets 0.
    """
    usable = [[t for t in g.trajectories if not t.is_quarantined] for g in groups]
    for size in sorted({len(rows) for rows in usable if rows}):
        together = [rows for rows in usable if len(rows) == size]
        values = torch.zeros(len(together), 1)
        if size > 1:
            rewards = [[_shaped(t, credit, sampling) for t in rows] for rows in together]
            values = _checked(credit.advantage, torch.tensor(rewards, dtype=torch.float64))
        for rows, row in zip(together, values.tolist(), strict=True):
            for trajectory, value in zip(rows, row, strict=True):
                is_cut = credit.truncated == "mask" and trajectory.finish_reason == "length"
                trajectory.credit = Credited(value, TRUNCATED if is_cut else None)


def _checked(advantage: Advantage, rewards: Tensor) -> Tensor:
    values = advantage(rewards).float()
    if values.shape != rewards.shape or not torch.isfinite(values).all():
        raise ConfigurationError(
            f"credit.advantage={getattr(advantage, '__name__', advantage)!r} turned rewards "
            f"{list(rewards.shape)} into advantages {list(values.shape)}"
            + ("" if values.shape != rewards.shape else ", not all of which are finite in fp32")
        )
    return values


def mean_reward(rows: Sequence[Trajectory]) -> float:
    """Mean of the rewards, as the reward function gave them; NaN if there is none."""
    rewards = [t.reward for t in rows if t.reward is not None]
    return sum(rewards) / len(rewards) if rewards else math.nan


def _shaped(trajectory: Trajectory, credit: Credit, sampling: Sampling) -> float:
    """The reward plus the soft penalty on long responses."""
    assert trajectory.reward is not None
    if not credit.overlong_cushion:
        return trajectory.reward
    penalty = soft_overlong_penalty(
        torch.tensor(trajectory.response_length),
        sampling.max_new_tokens,
        credit.overlong_cushion * sampling.max_new_tokens,
    )
    return trajectory.reward + float(penalty)
