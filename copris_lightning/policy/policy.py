"""The policy: a causal language model that is asked for log-probs of response tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.logprobs import token_logprobs, token_logprobs_and_entropy
from copris_lightning.policy.packing import (
    attend_by_sequence,
    obstacle,
    packed_inputs,
    packs_as_it_pads,
)
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
        self.packs = False
        """Whether sequences go through the model without padding; see :meth:`pack`."""
        silence(model)
        hold(self, model.get_output_embeddings())

    def pack(self, ask: Callable[[MicroBatch], Tensor]) -> None:
        """Go over to passes without padding, if the model computes the same by them; warn if not.

        Args:
            ask: this policy's log-probs of a micro-batch, through its strategy if it has one
                (with split weights every rank has to call this).
        """
        reason = obstacle(self.model)
        if reason is None:
            attend_by_sequence(self.model)
            self.packs = packs_as_it_pads(
                self._asked(ask, packs=False),
                self._asked(ask, packs=True),
                self.model.config.get_text_config().vocab_size,
            )
            if not self.packs:
                reason = "packed sequences change each other's log-probs"
        if reason is not None:
            rank_zero_warn(
                f"memory.packing: {reason}; sequences are padded, batches cut by their lengths"
            )

    @torch.no_grad()
    def ask(self, batch: MicroBatch) -> Tensor:
        """Log-probs of the response tokens, ``[B, R]`` in fp32 on the CPU."""
        logprobs: Tensor = self(batch.to(self.model.device))[0]
        return logprobs.cpu()

    def _asked(
        self, ask: Callable[[MicroBatch], Tensor], *, packs: bool
    ) -> Callable[[MicroBatch], Tensor]:
        def answer(batch: MicroBatch) -> Tensor:
            self.packs = packs
            return ask(batch)

        return answer

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
        size = batch.input_ids.shape[1]
        if self.packs:
            inputs = packed_inputs(batch, self.model)
            starts = batch.lengths.cumsum(0) - batch.lengths
        else:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            starts = torch.arange(len(batch.input_ids), device=batch.input_ids.device) * size
        with _uncached_casts(self) if isinstance(self, FSDPModule) else nullcontext():
            output = cast("Any", self.model.base_model)(**inputs, use_cache=False)
        places = (starts[:, None] + batch.response_positions)[batch.response_mask]
        # The output at one position predicts the token at the next.
        hidden = output.last_hidden_state.flatten(0, 1)[places - 1]
        return hidden, inputs["input_ids"].flatten()[places]


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
