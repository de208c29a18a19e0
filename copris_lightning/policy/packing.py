"""Forward passes without padding: sequences one after the other in one row, of which none sees
another.

Where a sequence begins the model is told by its position ids, which begin at 0 again; transformers
makes masks of them. FlashAttention gets lengths in place of a mask (``FlashAttentionKwargs``). SDPA
would get a mask of all pairs of a row's tokens, and compute with all of them; an attention function
of our own (``AttentionInterface``) calls it once for each sequence, with only what that sequence's
tokens see.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.generic import is_flash_attention_requested

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.trajectory import Trajectory

SDPA_BY_SEQUENCE = "sdpa_by_sequence"
"""The name of our attention function among transformers' implementations."""

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers whose tokens meet in attention only. (Recurrent ones and convolutions go on from
one sequence into the next.)"""

_PROBE = (9, 3, 14, 6)
"""Tokens of the sequences that packed and padded passes are compared on."""

_FACTOR = 8.0
"""How much further packed passes may be from each sequence by itself than padded ones are."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the tokens of a packed row see, in place of a mask.

    Attributes:
        sizes: tokens of each block; no token sees another block's.
        masks: ``[n, n]`` of each block of n tokens, true where the query (row) sees the key;
            ``None`` where each sees all before it in its block.
    """

    sizes: list[int]
    masks: list[Tensor | None]


def packed_inputs(batch: MicroBatch, model: PreTrainedModel) -> dict[str, Any]:
    """A micro-batch as the model's arguments: one row of all tokens, ``[1, N]``."""
    is_token = batch.attention_mask.bool()
    positions = torch.arange(is_token.shape[1], device=is_token.device).expand(is_token.shape)
    inputs: dict[str, Any] = {
        "input_ids": batch.input_ids[is_token][None],
        "position_ids": positions[is_token][None],
    }
    if is_flash_attention_requested(model.config):
        ends = batch.lengths.cumsum(0, dtype=torch.int32)
        bounds, longest = nn.functional.pad(ends, (1, 0)), int(batch.lengths.max())
        inputs.update(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
        inputs.update(max_length_q=longest, max_length_k=longest)
    return inputs


def obstacle(model: PreTrainedModel) -> str | None:
    """What is known to keep a model from computing on packed sequences; ``None`` for nothing."""
    name = model.config._attn_implementation
    if name not in ("sdpa", SDPA_BY_SEQUENCE) and not is_flash_attention_requested(model.config):
        return f"precision.attn_implementation={name} is neither sdpa nor a FlashAttention"
    kind = type(model).__name__
    if not model._supports_attention_backend or not model._can_set_attn_implementation():
        return f"{kind} computes its attention by itself"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{kind} takes no position ids"
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    others = sorted({str(layer) for layer in layers} - _ATTENTION)
    if model._is_stateful or others:
        return f"{kind} has layers of other kinds than attention ({', '.join(others) or 'a state'})"
    return None


def attend_by_sequence(model: PreTrainedModel) -> None:
    """Have a model that computes with SDPA do so sequence by sequence; see :class:`Blocks`."""
    if not is_flash_attention_requested(model.config):
        model.set_attn_implementation(SDPA_BY_SEQUENCE)


def packs_as_it_pads(
    padded: Callable[[MicroBatch], Tensor], packed: Callable[[MicroBatch], Tensor], vocabulary: int
) -> bool:
    """Whether packed passes are about as near to each sequence by itself as padded ones.

    How far those are is the rounding of this model in this precision. What comes over from another
    sequence, or from its positions, is more.

    Args:
        padded: a micro-batch's log-probs ``[B, R]``, by padded passes.
        packed: the same by packed passes.
        vocabulary: token ids to choose from.
    """
    rng = random.Random(0)
    sequences = [[rng.randrange(vocabulary) for _ in range(length)] for length in _PROBE]
    alone = torch.cat([padded(_whole([tokens]))[0] for tokens in sequences])
    batch = _whole(sequences)
    rounding, difference = (
        float((ask(batch)[batch.response_mask] - alone).abs().mean()) for ask in (padded, packed)
    )
    return difference <= _FACTOR * max(rounding, torch.finfo(torch.float32).eps)


def _whole(sequences: Sequence[Sequence[int]]) -> MicroBatch:
    """Whole sequences, as responses to their first token."""
    rows = []
    for i, tokens in enumerate(sequences):
        rows.append(Trajectory(0, i, "probe", (tokens[0],), len(tokens)))
        rows[-1].observe(tokens[1:])
    return collate(rows, source=None)


def _blocks(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Blocks | Tensor | None:
    """As :func:`transformers.masking_utils.sdpa_mask`; :class:`Blocks` of a row without padding.

    A token's view is taken to be a run of tokens that ends in itself, as it is in causal attention,
    sliding windows and chunks; a model that makes a mask of its own (``use_vmap``) gets all of it.
    """
    if batch_size > 1 or attention_mask is not None or use_vmap or q_length != kv_length:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            device=device,
            **options,
        )
    sees = partial(mask_function, 0, 0)
    tokens = torch.arange(q_length, device=device)
    begins = torch.ones(q_length, dtype=torch.bool, device=device)
    begins[1:] = ~sees(tokens[1:], tokens[:-1])
    starts, block = tokens[begins], begins.cumsum(0) - 1
    sizes = block.bincount().tolist()
    limited = set(block[~sees(tokens, starts[block])].tolist())
    masks = [
        sees(part[:, None], part[None, :]) if i in limited else None
        for i, part in enumerate(tokens.split(sizes))
    ]
    return Blocks(sizes, masks)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Blocks | Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA of ``[1, H, N, D]``, block by block."""
    if not isinstance(attention_mask, Blocks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = [tensor.split(attention_mask.sizes, dim=2) for tensor in (query, key, value)]
    outputs = [
        sdpa_attention_forward(module, q, k, v, mask, **options)[0]
        for q, k, v, mask in zip(*parts, attention_mask.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(SDPA_BY_SEQUENCE, _attention)
AttentionMaskInterface.register(SDPA_BY_SEQUENCE, _blocks)
