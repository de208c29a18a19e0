"""The policy-gradient estimator: ratio, loss, corrections and penalties put together, per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from copris_lightning.core.estimator.corrections import Correction
from copris_lightning.core.estimator.losses import ClippedPolicyLoss, PolicyLoss
from copris_lightning.core.estimator.normalization import NORMALIZATIONS, NormalizationName
from copris_lightning.core.estimator.penalties import KLPenalty, k3
from copris_lightning.core.estimator.ratios import Ratio, TokenRatio, TokenTerms
from copris_lightning.errors import ConfigurationError


@dataclass(slots=True)
class Estimate:
    """What the estimator makes of a micro-batch, ``[B, R]`` each; all but ``loss`` detached.

    Attributes:
        loss: of each token, 0 outside the mask; carries the gradient.
        mask: true at the tokens that count.
        lags: versions.
        ratio: the importance ratio that the loss sees.
        clipped_low: whether the loss's lower bound is active.
        clipped_high: whether an upper bound is.
        behavior_kl: k3 estimate of KL(behaviour || current), in nats.
        mismatch_kl: k3 estimate of KL(engine || trainer), in nats, where both are known.
        reference_kl: the penalty's estimate, before its coefficient, if there is one.
        entropy: in nats, where it was computed.
        mismatch: log of trainer over engine probability, where both are known.
        corrections: the weights of each correction, by its name, applied or not; and those of a
            decoupled ratio.
    """

    loss: Tensor
    mask: Tensor
    lags: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    behavior_kl: Tensor
    mismatch_kl: Tensor | None = None
    reference_kl: Tensor | None = None
    entropy: Tensor | None = None
    mismatch: Tensor | None = None
    corrections: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimator:
    r"""The policy-gradient estimator: the loss of each token.

    .. math:: \ell_t = \Big(\prod_c w_{c,t}\Big)\, \ell^{policy}_t + \beta\, k_t - \eta\, H_t

    with the corrections' (and a decoupled ratio's) constant weights w, the KL penalty k and the
    entropy H. The penalty and the bonus are estimated on the tokens as they were sampled, without
    importance weights.

    Attributes:
        loss: over the ratio.
        ratio: which policies it compares.
        corrections: constant weights on tokens, multiplied, for the engine-trainer mismatch or
            staleness.
        kl: penalty towards a reference policy, of which a frozen copy is kept on the device; with
            adapters none is needed for the checkpoint that training starts from.
        entropy_coefficient: of an entropy bonus, eta >= 0, per nat.
        normalization: how token losses become one number: ``token_mean``,
            ``sequence_mean_token_mean``, ``sequence_mean_token_sum`` or ``constant``; over the
            whole optimizer step, however it is split into micro-batches and ranks.
        log_entropy: compute the policy's entropy for the log; costs a softmax over the vocabulary
            per token.

    Raises:
        ConfigurationError: a value that cannot work, or corrections that would apply one ratio
            twice.
    """

    loss: PolicyLoss = field(default_factory=ClippedPolicyLoss)
    ratio: Ratio = field(default_factory=TokenRatio)
    corrections: Sequence[Correction] = ()
    kl: KLPenalty | None = None
    entropy_coefficient: float = 0.0
    normalization: NormalizationName = "token_mean"
    log_entropy: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "corrections", tuple(self.corrections))
        if not 0 <= self.entropy_coefficient < math.inf:
            raise ConfigurationError(
                f"entropy_coefficient={self.entropy_coefficient} must be a number of at least 0"
            )
        if self.normalization not in NORMALIZATIONS:
            raise ConfigurationError(
                f"normalization={self.normalization!r} must be one of {', '.join(NORMALIZATIONS)}"
            )
        names = [correction.name for correction in self.corrections]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"corrections: {name} is listed twice")
        reweighing = [c.name for c in self.corrections if c.reweighs and c.apply]
        if len(reweighing) > 1:
            raise ConfigurationError(
                f"corrections: {' and '.join(reweighing)} would multiply by the mismatch ratio "
                "twice; set apply: false or reweigh: false for one"
            )

    @property
    def needs_mismatch(self) -> bool:
        """Whether ``TokenTerms.mismatch`` must be there."""
        return any(correction.needs_mismatch for correction in self.corrections)

    @property
    def needs_proximal(self) -> bool:
        """Whether ``TokenTerms.proximal_logprobs`` must be there."""
        return self.ratio.needs_proximal

    @property
    def entropy_mode(self) -> Literal["none", "detached", "differentiable"]:
        """How ``TokenTerms.entropy`` must be there."""
        if self.entropy_coefficient:
            return "differentiable"
        return "detached" if self.log_entropy else "none"

    def __call__(self, terms: TokenTerms) -> Estimate:
        """The loss of each token and what to log about it.

        Args:
            terms: finite inside the mask; anything outside.
        """
        terms = terms.masked()
        log_ratio, weight = self.ratio(terms)
        parts = self.loss(log_ratio, terms.logprobs, terms.advantages)
        corrections = {}
        if self.ratio.weight_name is not None:
            corrections[self.ratio.weight_name] = weight
        for correction in self.corrections:
            corrections[correction.name] = correction(terms)
            if correction.apply:
                weight = weight * corrections[correction.name]
        loss = weight * parts.loss
        reference_kl = None
        if self.kl is not None:
            assert terms.reference_logprobs is not None, "there are no reference log-probs"
            reference_kl = self.kl(terms.logprobs, terms.reference_logprobs)
            loss = loss + self.kl.coefficient * reference_kl
        if self.entropy_coefficient:
            assert terms.entropy is not None, "the entropy was not computed"
            loss = loss - self.entropy_coefficient * terms.entropy
        mismatch = terms.mismatch
        return Estimate(
            loss=torch.where(terms.mask, loss, 0.0),
            mask=terms.mask,
            lags=terms.lags,
            ratio=log_ratio.detach().exp(),
            clipped_low=parts.clipped_low.detach() & terms.mask,
            clipped_high=parts.clipped_high.detach() & terms.mask,
            # k3 of sampler and other: here the behaviour (the engine) made the samples.
            behavior_kl=k3(terms.behavior_logprobs, terms.logprobs.detach()),
            mismatch_kl=None if mismatch is None else k3(torch.zeros_like(mismatch), mismatch),
            reference_kl=None if reference_kl is None else reference_kl.detach(),
            entropy=None if terms.entropy is None else terms.entropy.detach(),
            mismatch=mismatch,
            corrections=corrections,
        )
