"""A model's weights as ``save_pretrained`` would write them, one at a time.

transformers renames and fuses weights in memory (the experts of a layer are one tensor, Mixtral's
``block_sparse_moe`` is ``mlp``); checkpoints and engines know the weights by their old names. What
undoes that is transformers' own, as in ``save_pretrained``; only which weights it needs at once is
found out here, so that a model need not be held whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def as_saved(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names and in the shapes of a checkpoint.

    Args:
        model: whose weights they are.
        weights: full tensors under the model's own names, tied ones once, in any order; each may
            be gone when the next is asked for.

    Yields:
        as many as a checkpoint has; each may be gone when the next is asked for.
    """
    kept = model.all_tied_weights_keys
    ignored = set(model._keys_to_ignore_on_save or ())
    goal_of = _Goals(model)
    missing = Counter(goal_of(name) for name in _own_names(model))
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        name = kept.get(name, name)
        if name in ignored:
            continue
        goal = goal_of(name)
        missing[goal] -= 1
        parts = waiting.setdefault(goal, {})
        # Only what is made of several weights has to outlive the next one.
        parts[name] = tensor.clone() if missing[goal] else tensor
        if not missing[goal]:
            yield from revert_weight_conversion(model, waiting.pop(goal)).items()
    assert not waiting, f"{', '.join(waiting)} lack weights that they are made of"


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a checkpoint, under the model's own names; no strategy splits them."""
    for prefix, module in model.named_modules():
        prefix = prefix.replace("_fsdp_wrapped_module", "").replace("..", ".").strip(".")
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer.detach()


def _own_names(model: PreTrainedModel) -> list[str]:
    """Of all weights that come: without adapters, tied ones once."""
    kept = model.all_tied_weights_keys
    ignored = set(model._keys_to_ignore_on_save or ())
    names = [name.replace("_fsdp_wrapped_module.", "") for name, _ in model.named_parameters()]
    names = [n.replace(".base_layer.", ".") for n in names if ".lora_" not in n]
    names += [name for name, _ in saved_buffers(model)]
    return [name for name in (kept.get(n, n) for n in names) if name not in ignored]


class _Goals:
    """Tells which weights are converted together: those with one goal.

    ``revert_weight_conversion`` begins the same way, with all weights at hand.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            conversions = [
                conversion
                for conversion in get_model_conversion_mapping(model, add_legacy=False)
                if not isinstance(conversion, PrefixChange)
            ]
        reverse: list[Any] = [conversion.reverse_transform() for conversion in conversions[::-1]]
        self._renamings = [r for r in reverse if isinstance(r, WeightRenaming)]
        self._converters = [r for r in reverse if isinstance(r, WeightConverter)]

    def __call__(self, name: str) -> str:
        """The first of the names that a weight is saved as, perhaps with others."""
        goal, _ = rename_source_key(name, self._renamings, self._converters, reverse=True)
        return str(goal)
