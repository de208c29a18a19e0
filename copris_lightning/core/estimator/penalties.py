"""Estimates of the divergence from another policy, from its log-probs of the sampled tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from copris_lightning.core.estimator.ratios import clamp_log_ratio
from copris_lightning.errors import ConfigurationError


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    r"""Unbiased, of high variance, may be negative: :math:`\log \pi - \log \pi_{other}`.

    Its *gradient* has expectation zero on-policy: as a loss it does nothing but add noise.

    Args:
        logprobs: any shape, of tokens sampled from pi.
        other_logprobs: the same shape.

    Returns:
        an estimate of KL(pi || other) at each token, in nats.

    Source of k1, k2 and k3: Schulman (2020), "Approximating KL divergence"; of their gradients:
    arXiv 2510.01555.
    """
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    r"""Biased, of low variance: :math:`\frac{1}{2} (\log \pi - \log \pi_{other})^2`.

    Its gradient is, on-policy, that of KL(pi || other). Arguments as :func:`k1`.
    """
    return (logprobs - other_logprobs).square() / 2


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    r"""Unbiased, of low variance, never negative: :math:`e^{x} - 1 - x`, where
    :math:`x = \log \pi_{other} - \log \pi` (clamped, see ``MAX_LOG_RATIO``).

    GRPO's penalty (arXiv 2402.03300, equation 4). Its gradient is, on-policy, that of
    KL(other || pi). Arguments as :func:`k1`.
    """
    x = clamp_log_ratio(other_logprobs - logprobs)
    return x.expm1() - x


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True, slots=True)
class KLPenalty:
    """A penalty on the divergence from a reference policy, added to each token's loss.

    Attributes:
        coefficient: beta > 0, per nat.
        estimator: ``k1``, ``k2`` or ``k3``.
        reference: path or hub name of the reference policy; by default the checkpoint that
            training starts from.
    """

    coefficient: float = 0.001
    estimator: Literal["k1", "k2", "k3"] = "k3"
    reference: str | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ConfigurationError(f"estimator={self.estimator!r} must be k1, k2 or k3")
        if not 0 < self.coefficient < math.inf:
            raise ConfigurationError(
                f"coefficient={self.coefficient} must be a number above 0; null for no KL"
            )

    def __call__(self, logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
        """The estimate (not yet times the coefficient), shaped like its arguments."""
        return ESTIMATORS[self.estimator](logprobs, reference_logprobs)
