"""Policy-gradient losses per token, over a ratio from :mod:`.ratios`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from copris_lightning.errors import ConfigurationError


class TokenLoss(NamedTuple):
    """What a loss returns, every field ``[B, R]``.

    Attributes:
        loss: the loss of each token; carries the gradient.
        clipped_low: whether the lower bound of the ratio is active; detached.
        clipped_high: whether an upper bound is (dual clip included); detached.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


class PolicyLoss(ABC):
    """A loss per token. Its gradient at ratio 1 is the plain policy gradient."""

    @abstractmethod
    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> TokenLoss:
        """The loss of each token.

        Args:
            log_ratio: ``[B, R]``, with gradient.
            logprobs: ``[B, R]`` under the current policy, with gradient.
            advantages: ``[B, 1]`` or ``[B, R]``.

        Returns:
            :class:`TokenLoss` of shape ``[B, R]``.
        """


@dataclass(frozen=True, slots=True)
class ClippedPolicyLoss(PolicyLoss):
    r"""PPO's clipped surrogate with separate bounds and dual clip.

    .. math::
        \ell = \max(-A r,\; -A\,\mathrm{clip}(r, 1 - \epsilon_l, 1 + \epsilon_h)),
        \qquad A < 0:\; \ell = \min(\ell, -A c)

    A clipped token has no gradient.

    Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), clip-higher (DAPO, arXiv
    2503.14476), values of CoPRIS (arXiv 2511.05589).

    Attributes:
        clip_low: epsilon_l, 0 < clip_low < 1.
        clip_high: epsilon_h, > 0.
        dual_clip: c > 1, bound on the loss of tokens with negative advantage; null for none.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ConfigurationError(f"clip_low={self.clip_low} must lie between 0 and 1")
        if not self.clip_high > 0:
            raise ConfigurationError(f"clip_high={self.clip_high} must be positive")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigurationError(f"dual_clip={self.dual_clip} must be above 1")

    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> TokenLoss:
        """See the class."""
        ratio = log_ratio.exp()
        plain = -advantages * ratio
        bounded = -advantages * ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(plain, bounded)
        clipped = (bounded > plain).detach()
        low, high = clipped & (ratio < 1), clipped & (ratio > 1)
        if self.dual_clip is not None:
            bound = -advantages * self.dual_clip
            dual = (advantages < 0) & (bound < loss)
            loss = torch.where(dual, bound.expand_as(loss), loss)
            high = high | dual
        return TokenLoss(loss, low, high)


@dataclass(frozen=True, slots=True)
class CispoLoss(PolicyLoss):
    r"""CISPO: the ratio is a constant, clipped weight, so that every token keeps its gradient.

    .. math:: \ell = -\mathrm{sg}[\mathrm{clip}(r, 1 - \epsilon_l, 1 + \epsilon_h)]\, A \log \pi

    Source: MiniMax-M1, arXiv 2506.13585, section 3.1 (which sets no lower bound).

    Attributes:
        clip_low: epsilon_l, 0 < clip_low <= 1; 1 sets no lower bound.
        clip_high: epsilon_h, > 0.
    """

    clip_low: float = 1.0
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ConfigurationError(f"clip_low={self.clip_low} must be above 0 and at most 1")
        if not self.clip_high > 0:
            raise ConfigurationError(f"clip_high={self.clip_high} must be positive")

    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> TokenLoss:
        """See the class."""
        ratio = log_ratio.detach().exp()
        low, high = 1 - self.clip_low, 1 + self.clip_high
        loss = -ratio.clamp(low, high) * advantages * logprobs
        return TokenLoss(loss, ratio < low, ratio > high)


@dataclass(frozen=True, slots=True)
class ReinforceLoss(PolicyLoss):
    r"""REINFORCE with an importance weight that is clipped from above.

    .. math:: \ell = -\mathrm{sg}[\min(r, w_{max})]\, A \log \pi

    Sources: Williams (1992); truncated importance sampling, Ionides (2008), Espeholt et al.,
    IMPALA, arXiv 1802.01561.

    Attributes:
        max_weight: w_max > 0; null for none.
    """

    max_weight: float | None = 2.0

    def __post_init__(self) -> None:
        if self.max_weight is not None and not self.max_weight > 0:
            raise ConfigurationError(f"max_weight={self.max_weight} must be above 0")

    def __call__(self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> TokenLoss:
        """See the class."""
        ratio = log_ratio.detach().exp()
        weight = ratio if self.max_weight is None else ratio.clamp(max=self.max_weight)
        loss = -weight * advantages * logprobs
        return TokenLoss(loss, torch.zeros_like(ratio, dtype=torch.bool), weight < ratio)
