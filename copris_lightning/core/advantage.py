"""Group-relative advantages: one function per estimator."""

from __future__ import annotations

import torch
from torch import Tensor


def group_relative(rewards: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    r"""GRPO's advantage: reward relative to its group.

    .. math:: A_{ij} = \frac{r_{ij} - \mathrm{mean}_j\, r_{ij}}{\mathrm{std}_j\, r_{ij} + \epsilon}

    with the sample standard deviation (G - 1). A group of equal rewards gets exactly zero.

    Args:
        rewards: ``[groups, G]``, any unit, finite; computed in float64.
        normalize_std: divide by the standard deviation (GRPO), or not (Dr. GRPO).
        eps: added to the standard deviation, in units of reward.

    Returns:
        advantages ``[groups, G]``, float32.

    Raises:
        ValueError: not two-dimensional, G < 2 (nothing to compare with), or not finite.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, G >= 2], got {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    rewards = rewards.double()
    # Equal rewards are recognised before subtracting: their mean may round off the value.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centered = torch.where(equal, 0.0, rewards - rewards.mean(dim=1, keepdim=True))
    if normalize_std:
        centered = centered / (rewards.std(dim=1, keepdim=True) + eps)
    return centered.float()
