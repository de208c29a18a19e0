"""From token losses to one number: how much a token of each trajectory weighs.

The loss of an optimizer step is the sum over its trajectories of w_i times the sum of trajectory
i's token losses. Each function gives the w_i of some trajectories from their own lengths and the
step's totals, so that adding up over micro-batches and ranks gives the same as all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class UpdateTotals(NamedTuple):
    """What one optimizer step trains on, over all micro-batches and ranks.

    Trajectories that are left out of the loss before training (truncated ones under
    ``truncated: mask``, quarantined ones) are not counted; those that turn out not finite in the
    step itself are.

    Attributes:
        trajectories: n.
        tokens: response tokens.
        max_new_tokens: the limit on a response.
    """

    trajectories: int
    tokens: int
    max_new_tokens: int


def token_mean(lengths: Tensor, totals: UpdateTotals) -> Tensor:
    r"""Every token of the step weighs the same, :math:`w_i = 1 / \sum_j n_j`: DAPO (arXiv
    2503.14476, equation 8), CoPRIS.

    Args:
        lengths: n_i, ``[B]``, response tokens.
        totals: of the step.

    Returns:
        ``[B]``.
    """
    return lengths.new_ones(lengths.shape, dtype=_float(lengths)) / max(1, totals.tokens)


def sequence_mean_token_mean(lengths: Tensor, totals: UpdateTotals) -> Tensor:
    r"""Every trajectory weighs the same, :math:`w_i = 1 / (n\, n_i)`: GRPO (arXiv 2402.03300,
    equation 3), GSPO. Arguments as :func:`token_mean`."""
    return 1.0 / (lengths.clamp(min=1) * max(1, totals.trajectories))


def sequence_mean_token_sum(lengths: Tensor, totals: UpdateTotals) -> Tensor:
    r"""The mean over trajectories of their summed losses, :math:`w_i = 1 / n`: the policy gradient
    as it is in the textbook. Arguments as :func:`token_mean`."""
    return lengths.new_ones(lengths.shape, dtype=_float(lengths)) / max(1, totals.trajectories)


def constant(lengths: Tensor, totals: UpdateTotals) -> Tensor:
    r"""As before over the response limit L, :math:`w_i = 1 / (n\, L)`: Dr. GRPO (arXiv 2503.20783,
    section 3), which does not depend on the lengths. Arguments as :func:`token_mean`."""
    return sequence_mean_token_sum(lengths, totals) / totals.max_new_tokens


NormalizationName = Literal[
    "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"
]

NORMALIZATIONS: dict[str, Callable[[Tensor, UpdateTotals], Tensor]] = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
    "sequence_mean_token_sum": sequence_mean_token_sum,
    "constant": constant,
}


def _float(lengths: Tensor) -> torch.dtype:
    return lengths.dtype if lengths.is_floating_point() else torch.get_default_dtype()
