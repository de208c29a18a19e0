"""Log-probabilities of given tokens without ever holding the logits of all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    r"""Natural-log probability of each target token at a temperature.

    .. math:: \log p_i = z_{i,y_i} / \tau - \log \sum_v \exp(z_{i,v} / \tau)

    Logits are made for ``chunk_tokens`` tokens at a time, cast to fp32, and made again in the
    backward pass, so that the peak is ``chunk_tokens x V`` values rather than ``N x V``.

    Args:
        hidden: ``[N, D]``, the last layer's output that predicts each target.
        targets: ``[N]``, token ids.
        head: ``[n, D]`` to logits ``[n, V]``.
        temperature: tau > 0, of the distribution that was sampled from.
        chunk_tokens: tokens per chunk, >= 1.

    Returns:
        log-probs ``[N]``, fp32.
    """

    def one(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = head(hidden_chunk).float() / temperature
        chosen = logits.gather(-1, target_chunk[:, None]).squeeze(-1)
        return chosen - logits.logsumexp(-1)

    chunks = [
        checkpoint(one, h, t, use_reentrant=False) if torch.is_grad_enabled() else one(h, t)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.cat(chunks) if chunks else hidden.new_zeros(0, dtype=torch.float32)
