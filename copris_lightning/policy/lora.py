"""LoRA: low-rank adapters are trained, by peft, in place of the model's own weights."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.zero import whole
from copris_lightning.weights.adapter import AdapterShape, last_parts

ADAPTER = "default"
"""peft's name of the only adapter."""

_ADAPTED = re.compile(rf"(.+)\.(base_layer|lora_[AB]\.{ADAPTER})\.weight")
_FILE_PREFIX = "base_model.model."
"""Begins the names in an adapter's file: peft's wrapper, which is not used here."""


@dataclass(frozen=True, slots=True)
class LoRA:
    r"""Low-rank adapters in linear layers; all other weights stay as they are.

    A layer computes :math:`W x + \frac{\alpha}{r} B A x`, of which A and B are trained, kept in
    fp32. B starts at zero, so that training starts from the model itself (arXiv 2106.09685).

    Attributes:
        rank: r >= 1.
        alpha: > 0; the adapters' scale is alpha / rank.
        target_modules: the linear layers that get an adapter, by the ends of their names
            (``q_proj``); ``all-linear`` is all of them but the output head.
        sync: what the engine gets: ``merge``, all weights, the adapters added to them; or
            ``adapter``, the adapters alone, which the engine applies to weights of its own.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    sync: Literal["merge", "adapter"] = "merge"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigurationError(f"rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigurationError(f"alpha={self.alpha} must be a number above 0")
        if self.sync not in ("merge", "adapter"):
            raise ConfigurationError(f"sync={self.sync!r} must be merge or adapter")

    @property
    def scaling(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank

    def check(self, model: Any) -> None:
        """Refuse what cannot be trained, before anything slow starts.

        Args:
            model: the language model; its weights are not looked at.

        Raises:
            ConfigurationError: peft is not installed, or the model has no such layers.
        """
        if importlib.util.find_spec("peft") is None:
            raise ConfigurationError(
                'peft is not installed; install this package with the extra "lora"'
            )
        if getattr(model.config, "quantization_config", None) is not None:
            raise ConfigurationError(
                "the model's weights are quantized, and adapters cannot be added to such; "
                "set model to a checkpoint that is not"
            )
        self.layers(model)

    def shape(self, model: Any) -> AdapterShape | None:
        """Of the adapters that the engine gets; ``None`` if it gets whole weights."""
        if self.sync == "merge":
            return None
        return AdapterShape(self.rank, last_parts(self.layers(model)))

    def insert(self, model: Any) -> None:
        """Put adapters into a language model, in place, and freeze all other weights."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # only ever divided
            target_modules=self.layers(model),
            lora_dropout=0.0,  # the engine has none
            init_lora_weights=False,  # below, where weights are whole
        )
        inject_adapter_in_model(config, model, ADAPTER)
        for module in model.modules():
            if isinstance(module, LoraLayer):  # made in the model's own dtype
                module.lora_A.float()
                module.lora_B.float()
                with whole([*module.lora_A.parameters(), *module.lora_B.parameters()]):
                    module.reset_lora_parameters(ADAPTER, init_lora_weights=True)

    def layers(self, model: Any) -> list[str]:
        """Full names of the linear layers that get an adapter."""
        head = model.get_output_embeddings()
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ]
        if self.target_modules == "all-linear":
            return linear
        chosen: dict[str, None] = {}
        for target in self.target_modules:
            matched = [name for name in linear if f".{name}".endswith(f".{target}")]
            if not matched:
                raise ConfigurationError(
                    f"target_modules: no linear layer's name ends with {target!r} (the "
                    f"head's does not count); the model has {', '.join(last_parts(linear))}"
                )
            chosen |= dict.fromkeys(matched)
        if not chosen:
            raise ConfigurationError("target_modules=[] names no layer")
        return list(chosen)

    def merged(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        r"""The weights of the model without adapters, as :math:`W + \frac{\alpha}{r} B A`.

        Added up in fp32 and rounded to the dtype of W, one tensor at a time.

        Args:
            weights: full tensors of a model with adapters; one may be gone when the next is asked
                for.
        """
        waiting: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights:
            match = _ADAPTED.fullmatch(name)
            if match is None:
                yield name.replace(".base_layer.", "."), tensor  # the bias of an adapted layer
                continue
            layer, part = match.groups()
            parts = waiting.setdefault(layer, {})
            parts[part] = tensor.clone()
            if len(parts) == 3:
                del waiting[layer]
                weight = parts["base_layer"]
                a, b = (parts[f"lora_{x}.{ADAPTER}"].float() for x in "AB")
                yield f"{layer}.weight", (weight.float() + self.scaling * (b @ a)).to(weight.dtype)
        assert not waiting, f"weights of {', '.join(waiting)} are missing"

    def adapters(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone, named as in peft's files, with the scaling in B.

        Arguments as :meth:`merged`.
        """
        for name, tensor in weights:
            stem, adapter, _ = name.rpartition(f".{ADAPTER}.weight")
            if adapter:
                scaled = self.scaling * tensor if stem.endswith("lora_B") else tensor
                yield f"{_FILE_PREFIX}{stem}.weight", scaled


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes as if it had no adapters."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.set_scale(ADAPTER, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)
