"""Policy-gradient losses per token, over the importance ratio to the behaviour policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus and minus this before exp: e^20 = 5e8 is far past any clip."""


class TokenLoss(NamedTuple):
    """What a loss returns, every field shaped like its inputs, ``[B, R]``.

    Attributes:
        loss: the loss of each token; carries the gradient.
        ratio: the importance ratio pi_theta / behaviour; detached.
        clipped: whether the clip is active, so that the token has no gradient; detached. (Beyond
            ``MAX_LOG_RATIO`` a token has none either, whatever its advantage.)
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def importance_ratio(logprobs: Tensor, behavior_logprobs: Tensor) -> Tensor:
    r"""CoPRIS's cross-stage ratio, per token.

    .. math:: r_t = \exp(\log \pi_\theta(o_t) - \log \pi_{v(t)}(o_t))

    where v(t) is the version that produced token t: the behaviour log-probs are the segments'
    log-probs concatenated, so that each token is compared with the policy that made it.

    Args:
        logprobs: ``[B, R]``, natural log, under the current policy.
        behavior_logprobs: ``[B, R]``, natural log, of the concatenated segments.

    Returns:
        ratio ``[B, R]``.

    Source: CoPRIS, arXiv 2511.05589, section 3.3.
    """
    log_ratio = logprobs - behavior_logprobs
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@dataclass(frozen=True, slots=True)
class ClippedPolicyLoss:
    r"""PPO's clipped surrogate with separate bounds and dual clip, over the cross-stage ratio.

    .. math::
        \ell = \max(-A r,\; -A\,\mathrm{clip}(r, 1 - \epsilon_l, 1 + \epsilon_h)),
        \qquad A < 0:\; \ell = \min(\ell, -A c)

    Sources: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), clip-higher (DAPO, arXiv
    2503.14476), values of CoPRIS (arXiv 2511.05589).

    Attributes:
        clip_low: epsilon_l, 0 < clip_low < 1.
        clip_high: epsilon_h, > 0.
        dual_clip: c > 1, bound on the loss of tokens with negative advantage; null for none.
        importance_sampling: with ``false`` the ratio is taken to the current policy itself, so it
            is 1 and corrects nothing (the ablation in ``configs/overlays/no_is.yaml``).
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0
    importance_sampling: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low={self.clip_low} must lie between 0 and 1")
        if self.clip_high <= 0:
            raise ValueError(f"clip_high={self.clip_high} must be positive")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1")

    def __call__(
        self, logprobs: Tensor, behavior_logprobs: Tensor, advantages: Tensor
    ) -> TokenLoss:
        """Loss of each token.

        Args:
            logprobs: ``[B, R]`` under the current policy, with gradient.
            behavior_logprobs: ``[B, R]``, constant.
            advantages: ``[B, 1]`` or ``[B, R]``.

        Returns:
            :class:`TokenLoss` of shape ``[B, R]``; padding is the caller's to mask.
        """
        if not self.importance_sampling:
            behavior_logprobs = logprobs.detach()
        ratio = importance_ratio(logprobs, behavior_logprobs.detach())
        plain = -advantages * ratio
        bounded = -advantages * ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(plain, bounded)
        clipped = bounded > plain
        if self.dual_clip is not None:
            bound = -advantages * self.dual_clip
            dual = (advantages < 0) & (bound < loss)
            loss = torch.where(dual, bound.expand_as(loss), loss)
            clipped = clipped | dual
        return TokenLoss(loss, ratio.detach(), clipped.detach())
