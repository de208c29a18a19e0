"""The policy: a causal language model that is asked for log-probs of response tokens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.logprobs import token_logprobs, token_logprobs_and_entropy
from copris_lightning.policy.randomness import silence
from copris_lightning.policy.zero import hold, unhooked


class Policy(nn.Module):
    """A language model whose one forward pass gives log-probs instead of logits.

    Everything that touches its weights happens in :meth:`forward`, which is where strategies that
    split weights over ranks put them together.

    Args:
        model: the language model; its parameters keep the checkpoint's names in it.
        chunk_tokens: tokens whose logits are held at a time.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        silence(model)
        hold(self, model.get_output_embeddings())

    def forward(
        self, batch: MicroBatch, entropy: Literal["none", "detached", "differentiable"] = "none"
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the response tokens, and the entropies of the distributions they are from.

        Args:
            batch: of B trajectories, the longest response of R tokens.
            entropy: whether to compute entropies, and whether with a gradient.

        Returns:
            log-probs ``[B, R]`` of the distribution sampled from and entropies ``[B, R]`` in nats,
            or ``None``; both fp32 and 0 at padding.
        """
        hidden, targets = self._predictions(batch)
        head = unhooked(self.model.get_output_embeddings())  # once per chunk
        scale = batch.sampling.temperature
        options: Any = {"temperature": scale, "chunk_tokens": self.chunk_tokens}
        if entropy == "none":
            values = token_logprobs(hidden, targets, head, **options)
            return _unflatten(values, batch), None
        logprobs, entropies = token_logprobs_and_entropy(
            hidden, targets, head, differentiable=entropy == "differentiable", **options
        )
        return _unflatten(logprobs, batch), _unflatten(entropies, batch)

    def _predictions(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The last layer's outputs that predict response tokens ``[N, D]``, and those ``[N]``."""
        with _uncached_casts(self) if isinstance(self, FSDPModule) else nullcontext():
            output = cast("Any", self.model.base_model)(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        mask, positions = batch.response_mask, batch.response_positions
        rows = torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)
        # The output at one position predicts the token at the next.
        hidden = output.last_hidden_state[rows[mask], positions[mask] - 1]
        return hidden, batch.input_ids[rows[mask], positions[mask]]


def _uncached_casts(module: nn.Module) -> AbstractContextManager[None]:
    """Autocast without a memory: it would keep a copy of every weight that it casts, which are
    whole ones while split weights are put together."""
    device = next(module.parameters()).device.type
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )


def _unflatten(values: Tensor, batch: MicroBatch) -> Tensor:
    """``[N]`` response tokens to ``[B, R]``, 0 at padding."""
    mask = batch.response_mask
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
