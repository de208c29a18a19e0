"""Group-relative advantages: one function per estimator, chosen by name in YAML.

Every one of them takes rewards ``[groups, G]`` and gives advantages ``[groups, G]``; computes in
float64; gives exactly zero to a group of equal rewards; and refuses rewards that are not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

STD_EPSILON = 1e-6
"""Added to a group's standard deviation, in units of reward: where the rewards of a group differ
by less than about this, their advantages shrink to nothing instead of blowing up."""


def grpo(rewards: Tensor) -> Tensor:
    r"""GRPO: reward relative to its group, in standard deviations.

    .. math:: A_{ij} = \frac{r_{ij} - \mathrm{mean}_j\, r_{ij}}{\mathrm{std}_j\, r_{ij} + \epsilon}

    with the sample standard deviation (over G - 1).

    Args:
        rewards: ``[groups, G]``, any unit.

    Returns:
        advantages ``[groups, G]``, float32.

    Raises:
        ValueError: not two-dimensional, G < 2 (nothing to compare with), or not finite.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    centered = _centered(rewards)
    return (centered / (rewards.double().std(dim=1, keepdim=True) + STD_EPSILON)).float()


def dr_grpo(rewards: Tensor) -> Tensor:
    r"""Dr. GRPO: reward relative to its group, not divided by the spread, which weights prompts by
    how evenly hard they are.

    .. math:: A_{ij} = r_{ij} - \mathrm{mean}_j\, r_{ij}

    Arguments, result and errors as :func:`grpo`; the advantage has the reward's unit.

    Source: Liu et al., arXiv 2503.20783, section 3.
    """
    return _centered(rewards).float()


def rloo(rewards: Tensor) -> Tensor:
    r"""RLOO: the baseline of a trajectory is the mean reward of the *others*, so that it does not
    depend on the trajectory and the gradient is unbiased.

    .. math:: A_{ij} = r_{ij} - \frac{1}{G - 1} \sum_{k \ne j} r_{ik}
                     = \frac{G}{G - 1} (r_{ij} - \mathrm{mean}_k\, r_{ik})

    Arguments, result and errors as :func:`grpo`; the advantage has the reward's unit.

    Source: Ahmadian et al., arXiv 2402.14740, section 3.
    """
    size = rewards.shape[-1]
    return (_centered(rewards) * (size / max(1, size - 1))).float()


def _centered(rewards: Tensor) -> Tensor:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, G >= 2], got {tuple(rewards.shape)}")
    if not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite")
    rewards = rewards.double()
    # Equal rewards are recognised before subtracting: their mean may round off the value.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, rewards - rewards.mean(dim=1, keepdim=True))


def soft_overlong_penalty(lengths: Tensor, limit: int, cushion: float) -> Tensor:
    r"""DAPO's soft overlong punishment, to be added to the reward before the advantage.

    .. math::
        p(n) = \mathrm{clip}\left(\frac{(L - c) - n}{c},\; -1,\; 0\right)

    No penalty up to L - c tokens, then linearly down to -1 at the limit.

    Args:
        lengths: response tokens, any shape.
        limit: L, the most tokens a response may have.
        cushion: c, in tokens, over which the penalty grows; 0 < c <= L.

    Returns:
        the penalty, shaped like ``lengths``, float64, between -1 and 0, in units of reward.

    Source: DAPO, arXiv 2503.14476, equation 13.
    """
    return ((limit - cushion - lengths.double()) / cushion).clamp(-1.0, 0.0)
