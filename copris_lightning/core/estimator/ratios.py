r"""Importance ratios: what the current policy is compared with.

A trajectory of a partial rollout was written by several policy versions. Token t has version v(t),
lag d(t) = u - v(t) at the version u that is trained, and a behaviour log-prob under v(t): the
segments' log-probs concatenated. All log-ratios are natural logarithms of shape ``[B, R]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from copris_lightning.errors import ConfigurationError

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus and minus this before exp: e^20 = 5e8 is far past any clip. Beyond
it a token has no gradient through its ratio."""


@dataclass(slots=True)
class TokenTerms:
    """What is known of the response tokens of a micro-batch.

    Attributes:
        logprobs: ``[B, R]`` under the current policy, with gradient.
        behavior_logprobs: ``[B, R]`` under the version that made each token; constant.
        advantages: ``[B, 1]`` or ``[B, R]``.
        mask: ``[B, R]``, true at response tokens. Values elsewhere are never looked at.
        lags: ``[B, R]``, versions.
        mismatch: ``[B, R]``, log of trainer over engine probability, both under the version that
            made the token; ``None`` where only the engine's are known.
        proximal_logprobs: ``[B, R]`` under the version being trained, before its first update on
            this batch; ``None`` unless a ratio asks for them.
        reference_logprobs: ``[B, R]`` under a reference policy, or ``None``.
        entropy: ``[B, R]`` of the current policy's next-token distribution, in nats, with
            gradient; or ``None``.
    """

    logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    lags: Tensor
    mismatch: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def not_finite(self) -> Tensor:
        """Trajectories with a log-prob of the current or reference policy that is not, ``[B]``."""
        finite = torch.isfinite(self.logprobs)
        if self.reference_logprobs is not None:
            finite = finite & torch.isfinite(self.reference_logprobs)
        return ~finite.all(dim=1)

    def masked(self) -> TokenTerms:
        """The same with zeros outside the mask, whatever stood there (NaN too)."""

        def clean(values: Tensor | None) -> Tensor | None:
            return None if values is None else torch.where(self.mask, values, 0.0)

        return TokenTerms(
            logprobs=torch.where(self.mask, self.logprobs, 0.0),
            behavior_logprobs=torch.where(self.mask, self.behavior_logprobs.detach(), 0.0),
            advantages=torch.where(self.mask, self.advantages, 0.0),
            mask=self.mask,
            lags=torch.where(self.mask, self.lags, 0),
            mismatch=clean(self.mismatch),
            proximal_logprobs=clean(self.proximal_logprobs),
            reference_logprobs=clean(self.reference_logprobs),
            entropy=clean(self.entropy),
        )


class RatioTerms(NamedTuple):
    """What a ratio returns, ``[B, R]`` each.

    Attributes:
        log_ratio: of the current policy to the policy that the loss clips against; with gradient.
        weight: a constant factor on the token's loss.
    """

    log_ratio: Tensor
    weight: Tensor


class Ratio(ABC):
    """Which policies the importance ratio compares, per token or per sequence."""

    weight_name: str | None = None
    """What to log its weight as, among the corrections; ``None`` if the weight is always 1."""

    @property
    def needs_proximal(self) -> bool:
        """Whether ``TokenTerms.proximal_logprobs`` must be there."""
        return False

    @abstractmethod
    def __call__(self, terms: TokenTerms) -> RatioTerms:
        """The log-ratio and weight of each token."""


@dataclass(frozen=True, slots=True)
class TokenRatio(Ratio):
    r"""CoPRIS's cross-stage ratio: each token against the policy that made it.

    .. math:: r_t = \frac{\pi_\theta(o_t)}{\pi_{v(t)}(o_t)}

    With one version per trajectory it is GRPO's.

    Source: CoPRIS, arXiv 2511.05589, section 3.3.
    """

    def __call__(self, terms: TokenTerms) -> RatioTerms:
        """See the class."""
        log_ratio = clamp_log_ratio(terms.logprobs - terms.behavior_logprobs)
        return RatioTerms(log_ratio, torch.ones_like(log_ratio).detach())


@dataclass(frozen=True, slots=True)
class SequenceRatio(Ratio):
    r"""One ratio for a whole response, shared by its tokens.

    .. math::
        s = \left(\prod_t \frac{\pi_\theta(o_t)}{\pi_{v(t)}(o_t)}\right)^{1/n}
        \qquad \text{or, not normalised,} \qquad s = \prod_t \frac{\pi_\theta(o_t)}{\pi_{v(t)}(o_t)}

    The first is GSPO's. The second is the one ratio whose policy gradient is exactly unbiased while
    nothing is clipped (``docs/estimator.md``), at the price of a variance that grows with the
    length. With :class:`ClippedPolicyLoss` every token's loss carries the whole response's
    gradient: give it ``normalization: sequence_mean_token_mean``. With the losses that weight
    log-probs, each token carries its own: give those ``sequence_mean_token_sum``.

    Source: GSPO, arXiv 2507.18071, equations 5 to 7.

    Attributes:
        length_normalized: take the geometric mean over the n tokens (GSPO).
    """

    length_normalized: bool = True

    def __call__(self, terms: TokenTerms) -> RatioTerms:
        """See the class."""
        differences = torch.where(terms.mask, terms.logprobs - terms.behavior_logprobs, 0.0)
        log_ratio = differences.sum(dim=1, keepdim=True)
        if self.length_normalized:
            log_ratio = log_ratio / terms.mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = clamp_log_ratio(log_ratio).expand_as(differences)
        return RatioTerms(log_ratio, torch.ones_like(log_ratio).detach())


@dataclass(frozen=True, slots=True)
class DecoupledRatio(Ratio):
    r"""Decoupled PPO: clip against a proximal policy, weight by how far that is from the behaviour.

    .. math::
        r_t = \frac{\pi_\theta(o_t)}{\pi_{prox}(o_t)}, \qquad
        w_t = \min\left(\frac{\pi_{prox}(o_t)}{\pi_{v(t)}(o_t)},\; w_{max}\right)

    The proximal policy is the version u being trained, before its first update on the batch:
    ``recompute`` has the trainer compute its log-probs; ``loglinear`` interpolates between
    behaviour and current by version, which costs no forward pass (:func:`loglinear_proximal`).

    Beyond w_max the weight is truncated; AReaL's code leaves such tokens out.

    Sources: Hilton et al., arXiv 2110.00641, section 3; AReaL, arXiv 2505.24298, section 5.2.

    Attributes:
        proximal: ``recompute`` or ``loglinear``.
        max_weight: w_max > 0; null for no limit.
    """

    proximal: Literal["recompute", "loglinear"] = "recompute"
    max_weight: float | None = 5.0
    weight_name = "decoupled"

    def __post_init__(self) -> None:
        if self.proximal not in ("recompute", "loglinear"):
            raise ConfigurationError(f"proximal={self.proximal!r} must be recompute or loglinear")
        if self.max_weight is not None and not self.max_weight > 0:
            raise ConfigurationError(f"max_weight={self.max_weight} must be above 0")

    @property
    def needs_proximal(self) -> bool:
        """Only ``recompute`` does."""
        return self.proximal == "recompute"

    def __call__(self, terms: TokenTerms) -> RatioTerms:
        """See the class."""
        if self.proximal == "loglinear":
            proximal = loglinear_proximal(
                terms.logprobs.detach(), terms.behavior_logprobs, terms.lags
            )
        else:
            assert terms.proximal_logprobs is not None, "proximal log-probs were not recomputed"
            proximal = terms.proximal_logprobs
        weight = clamp_log_ratio(proximal - terms.behavior_logprobs).exp()
        if self.max_weight is not None:
            weight = weight.clamp(max=self.max_weight)
        return RatioTerms(clamp_log_ratio(terms.logprobs - proximal), weight.detach())


@dataclass(frozen=True, slots=True)
class UncorrectedRatio(Ratio):
    """No importance sampling: the ratio is taken to the current policy itself, so it is 1 and
    corrects nothing. The ablation in ``configs/overlays/no_is.yaml``."""

    def __call__(self, terms: TokenTerms) -> RatioTerms:
        """See the class."""
        log_ratio = terms.logprobs - terms.logprobs.detach()
        return RatioTerms(log_ratio, torch.ones_like(log_ratio).detach())


def loglinear_proximal(logprobs: Tensor, behavior_logprobs: Tensor, lags: Tensor) -> Tensor:
    r"""The version u's log-probs, interpolated between those of v(t) and the current policy's.

    .. math::
        \log \pi_{prox} \approx \log \pi_{v} + \alpha (\log \pi_\theta - \log \pi_v), \qquad
        \alpha = \frac{u - v}{(u + 1) - v} = \frac{d}{d + 1}

    since the current policy is on its way from version u to u + 1. A token without lag was made by
    the proximal policy itself, and gets exactly its behaviour log-prob.

    Args:
        logprobs: ``[B, R]`` under the current policy.
        behavior_logprobs: ``[B, R]``.
        lags: d, ``[B, R]``, versions.

    Source: A-3PO, arXiv 2512.06547; AReaL's documentation of its proximal approximation.
    """
    alpha = lags / (lags + 1)
    return behavior_logprobs + alpha * (logprobs - behavior_logprobs)


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Bounded by :data:`MAX_LOG_RATIO`, so that exp and its square are finite in fp32."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
