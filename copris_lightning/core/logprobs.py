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
        return _chosen(logits, target_chunk) - logits.logsumexp(-1)

    return _in_chunks(one, hidden, targets, chunk_tokens)


def token_logprobs_and_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    differentiable: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""As :func:`token_logprobs`, and the entropy of each next-token distribution.

    .. math:: H_i = \log \sum_v e^{z_{i,v} / \tau} - \sum_v p_{i,v}\, z_{i,v} / \tau

    Args:
        differentiable: whether the entropy has a gradient (its bonus needs one).

    Returns:
        log-probs ``[N]`` and entropies ``[N]`` in nats, fp32.
    """

    def one(hidden_chunk: Tensor, target_chunk: Tensor) -> Tensor:
        logits = head(hidden_chunk).float() / temperature
        total = logits.logsumexp(-1)
        logprobs = _chosen(logits, target_chunk) - total
        if not differentiable:
            logits, total = logits.detach(), total.detach()
        # A token that cannot occur has logit -inf and probability 0: together NaN, in truth 0.
        expected = logits.softmax(-1) * logits.clamp(min=torch.finfo(logits.dtype).min)
        return torch.stack([logprobs, total - expected.sum(-1)], dim=-1)

    both = _in_chunks(one, hidden, targets, chunk_tokens).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _chosen(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1)


def _in_chunks(
    one: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, targets: Tensor, chunk_tokens: int
) -> Tensor:
    chunks = [
        checkpoint(one, h, t, use_reentrant=False) if torch.is_grad_enabled() else one(h, t)
        for h, t in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.cat(chunks) if chunks else hidden.new_zeros(0, dtype=torch.float32)
