r"""Corrections: constant weights on tokens, orthogonal to the loss.

Two log-ratios can go wrong apart from each other:

==========  ======================================================================================
mismatch    trainer over engine probability of a token, both under the version that made it: two
            programs computing one policy (kernels, precision). Known where the trainer recomputes
            the behaviour log-probs; nothing else corrects it.
policy      current policy over behaviour: how far training went. The loss has it as its ratio
            already, so a correction can only leave tokens out by it.
==========  ======================================================================================

A correction returns a weight per token, 0 for a token that is left out. What it leaves out does not
change the denominator of the mean, so gradients stay exact under any split.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from copris_lightning.core.estimator.ratios import TokenTerms, clamp_log_ratio
from copris_lightning.errors import ConfigurationError

Level = Literal["token", "sequence", "geometric"]
Quotient = Literal["mismatch", "policy"]


class Correction(ABC):
    """A weight per token. ``apply=False`` only measures: metrics are logged, the loss is as is."""

    apply: bool

    @property
    def needs_mismatch(self) -> bool:
        """Whether ``TokenTerms.mismatch`` must be there."""
        return False

    @property
    def reweighs(self) -> bool:
        """Whether kept tokens are multiplied by the mismatch ratio."""
        return False

    @property
    @abstractmethod
    def name(self) -> str:
        """For metrics: ``correction/<name>/ess`` and so on."""

    @abstractmethod
    def __call__(self, terms: TokenTerms) -> Tensor:
        """The weight of each token, ``[B, R]``, >= 0, constant."""


@dataclass(frozen=True, slots=True)
class Truncation(Correction):
    r"""Truncated importance sampling of the engine-trainer mismatch.

    .. math:: w = \min\left(\frac{\pi^{trainer}_{v}}{\pi^{engine}_{v}},\; w_{max}\right)

    Source: TIS, Yao et al. (2025), "Your efficient RL framework secretly brings you off-policy RL
    training"; the idea is Ionides (2008).

    Attributes:
        max_weight: w_max > 0.
        level: the ratio of a ``token``, or of its whole ``sequence`` (the product), or the
            ``geometric`` mean over the sequence.
        apply: false only measures.
    """

    max_weight: float = 2.0
    level: Level = "token"
    apply: bool = True
    needs_mismatch = True
    reweighs = True

    def __post_init__(self) -> None:
        _check_level(self.level)
        if not self.max_weight > 0:
            raise ConfigurationError(f"max_weight={self.max_weight} must be above 0")

    @property
    def name(self) -> str:
        """See :class:`Correction`."""
        return f"truncation_{self.level}"

    def __call__(self, terms: TokenTerms) -> Tensor:
        """See the class."""
        return _ratio(terms, "mismatch", self.level).clamp(max=self.max_weight)


@dataclass(frozen=True, slots=True)
class Masking(Correction):
    r"""Leaves tokens or sequences out whose ratio is outside an interval.

    .. math:: w = k \cdot 1[low \le k \le high] \quad\text{or}\quad w = 1[low \le k \le high]

    Over the mismatch of tokens and with ``reweigh`` it is IcePop; over the geometric mean of a
    sequence's policy ratio, for negative advantages only, it is the off-policy sequence masking of
    DeepSeek-V3.2 (arXiv 2512.02556).

    Source: IcePop, Ling team (2025), "Small leak can sink a great ship", also arXiv 2510.18855.

    Attributes:
        low: least ratio kept, >= 0.
        high: largest ratio kept, >= low; null for none.
        ratio: ``mismatch`` or ``policy``; see the module's table.
        level: as for :class:`Truncation`.
        reweigh: multiply what is kept by the ratio (``mismatch`` only).
        negative_only: leave out only tokens with negative advantage.
        apply: false only measures.
    """

    low: float = 0.5
    high: float | None = 5.0
    ratio: Quotient = "mismatch"
    level: Level = "token"
    reweigh: bool = False
    negative_only: bool = False
    apply: bool = True

    def __post_init__(self) -> None:
        _check_level(self.level)
        if self.ratio not in ("mismatch", "policy"):
            raise ConfigurationError(f"ratio={self.ratio!r} must be mismatch or policy")
        if not 0 <= self.low <= (math.inf if self.high is None else self.high):
            raise ConfigurationError(
                f"low={self.low} and high={self.high} must be 0 <= low <= high"
            )
        if self.reweigh and self.ratio == "policy":
            raise ConfigurationError(
                "reweigh=true needs ratio=mismatch: the loss has the policy ratio"
            )

    @property
    def needs_mismatch(self) -> bool:
        """See :class:`Correction`."""
        return self.ratio == "mismatch"

    @property
    def reweighs(self) -> bool:
        """See :class:`Correction`."""
        return self.reweigh

    @property
    def name(self) -> str:
        """See :class:`Correction`."""
        return f"masking_{self.ratio}_{self.level}"

    def __call__(self, terms: TokenTerms) -> Tensor:
        """See the class."""
        ratio = _ratio(terms, self.ratio, self.level)
        kept = (ratio >= self.low) & (ratio <= (math.inf if self.high is None else self.high))
        if self.negative_only:
            kept = kept | (terms.advantages >= 0)
        return torch.where(kept, ratio if self.reweigh else torch.ones_like(ratio), 0.0)


@dataclass(frozen=True, slots=True)
class LagRejection(Correction):
    """Leaves out what is too stale, by the number of versions.

    Attributes:
        max_lag: largest lag kept, >= 0.
        level: reject the stale ``token``, or the whole ``sequence`` that has one.
        apply: false only measures.
    """

    max_lag: int = 4
    level: Literal["token", "sequence"] = "token"
    apply: bool = True

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence"):
            raise ConfigurationError(f"level={self.level!r} must be token or sequence")
        if self.max_lag < 0:
            raise ConfigurationError(f"max_lag={self.max_lag} must be at least 0")

    @property
    def name(self) -> str:
        """See :class:`Correction`."""
        return f"lag_rejection_{self.level}"

    def __call__(self, terms: TokenTerms) -> Tensor:
        """See the class."""
        lags = torch.where(terms.mask, terms.lags, 0)
        if self.level == "sequence":
            lags = lags.amax(dim=1, keepdim=True).expand_as(lags)
        return (lags <= self.max_lag).to(terms.behavior_logprobs.dtype)


def effective_sample_share(total: float, squares: float, count: float) -> float:
    r"""Kish's effective sample size as a share of the samples: 1 for equal weights.

    .. math:: \mathrm{ESS} / n = \frac{(\sum_i w_i)^2}{n \sum_i w_i^2}

    Args:
        total: sum of the weights, each >= 0.
        squares: sum of their squares.
        count: n > 0.

    Returns:
        between 0 and 1; 0 if all weights are.

    Source: Kish (1965), "Survey sampling".
    """
    return total**2 / (count * squares) if squares else 0.0


def _ratio(terms: TokenTerms, quotient: Quotient, level: Level) -> Tensor:
    if quotient == "mismatch":
        assert terms.mismatch is not None, "the trainer's log-probs are not at hand"
        log_ratio = terms.mismatch.detach()
    else:
        log_ratio = terms.logprobs.detach() - terms.behavior_logprobs
    log_ratio = torch.where(terms.mask, log_ratio, 0.0)
    if level != "token":
        total = log_ratio.sum(dim=1, keepdim=True)
        if level == "geometric":
            total = total / terms.mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = total.expand_as(log_ratio)
    return clamp_log_ratio(log_ratio).exp()


def _check_level(level: str) -> None:
    if level not in ("token", "sequence", "geometric"):
        raise ConfigurationError(f"level={level!r} must be token, sequence or geometric")
