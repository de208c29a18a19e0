"""Whether an engine computes with what it was sent, tensor by tensor; runs in vLLM's workers.

It takes three steps from a tensor that was sent to a layer that computes, and each is compared:

1. *sent to loaded*. A load ends in copies of (slices of) what was sent into parameters, however a
   model's own loader stacks, splits over ranks or transposes. They are watched, and a parameter has
   to hold just what was copied into it: its checksum, which does not depend on the order, is that
   of the slices together. What nothing was copied into was not sent.
2. *loaded to packed*. Kernels may work on a copy of a weight in an order of their own. A linear
   layer is asked for products with unit vectors, which are columns of the weight that it computes
   with, to the bit; those columns are asked for that changed since the last load. Experts, whose
   kernel is no product, have to hold the same elements and, on a CPU, to agree with the formula to
   rounding.
3. *what was left over*: sent, and copied nowhere.

So a tensor is caught that stayed as it was, however small the step, and a load that changed nothing
is no error. Not compared: quantized layers and kinds of layers unknown here; they are listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from copris_lightning.weights.copies import (
    Copies,
    Tensors,
    Written,
    checksum,
    column_checksums,
    looking_away,
)

_COLUMNS = 4
"""Of a weight that are asked for."""


@dataclass
class _Load:
    """What was seen of one load. By the engine's names: what its parameters have to hold, columns
    of linear layers' weights, experts' outputs and elements; parameters that held something else
    when their kernel got them, and such as nothing was copied into."""

    copies: Copies = field(default_factory=Copies)
    expected: dict[str, Written] = field(default_factory=dict)
    columns: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    experts: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    hooks: ExitStack = field(default_factory=ExitStack)


class Arrival:
    """What the last load brought, and whether the engine computes with it.

    A load may come in parts: :meth:`begin`, :meth:`watching` around each part, :meth:`end`.

    Args:
        model: the engine's.
        dtype: that it computes in.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self.sent: dict[str, int] = {}
        self._load = _Load()
        self._sums: dict[str, Tensor] = {}
        self._exact: set[str] = set()
        self._ignored: list[str] = []
        self._unused: list[str] = []

    def begin(self) -> None:
        """Before a load. What was seen of the last one, also if it was not ended, is forgotten."""
        self._load.hooks.close()
        self._load = _Load()
        names = {module: name for name, module in self._model.named_modules()}
        for module in names:
            method = getattr(module, "quant_method", None)
            if hasattr(method, "process_weights_after_loading"):
                self._load.hooks.enter_context(self._hooked(method, names))

    @contextmanager
    def watching(self) -> Iterator[Callable[[Tensors], Tensors]]:
        """Around a part of a load: notes what becomes of the tensors that pass through what it
        gives."""
        with self._load.copies:
            yield self._load.copies.watched

    def end(self) -> dict[str, Any]:
        """After a load.

        Returns:
            :meth:`report`.
        """
        self._load.hooks.close()
        self._settle(self._load.copies)
        return self.report()

    @contextmanager
    def _hooked(self, method: Any, names: dict[nn.Module, str]) -> Iterator[None]:
        """Looks at a layer's weights once more before its kernel gets them."""
        if "process_weights_after_loading" in vars(method):
            yield  # one for several layers
            return
        process = method.process_weights_after_loading
        copies = self._load.copies

        def look_first(layer: nn.Module) -> None:
            with looking_away():
                self._note_loaded(names[layer], layer, copies)
            process(layer)

        method.process_weights_after_loading = look_first
        try:
            yield
        finally:
            del method.process_weights_after_loading

    @torch.no_grad()
    def _note_loaded(self, name: str, layer: Any, copies: Copies) -> None:
        if _is_linear(layer):
            self._choose_columns(name, layer.weight)
        for key, parameter in layer.named_parameters(recurse=False):
            if parameter.numel() == 0 or parameter.is_meta:
                continue
            written = copies.of(parameter)
            if key == "weight" and name in self._load.columns:
                total = int(self._sums[name].sum()) % 2**64
            else:
                total = checksum(parameter)
            if written is None:
                self._load.absent.add(f"{name}.{key}")
            elif not written.agrees(total):
                self._load.wrong.add(f"{name}.{key}")
        if _has_experts(layer):
            both = checksum(layer.w13_weight) + checksum(layer.w2_weight)
            self._load.experts[name] = (_expert_outputs(layer, self._dtype), both % 2**64)

    def _choose_columns(self, name: str, weight: Any) -> None:
        """Keep columns to compare, first of all such as changed since the last load."""
        sums = column_checksums(weight)
        before = self._sums.get(name)
        changed = torch.zeros_like(sums) if before is None else (sums != before).long()
        # Those that changed come first; among equals, spread evenly.
        spread = torch.arange(len(sums), device=sums.device) * 0.61803398875 % 1.0
        chosen = (changed + spread).topk(min(_COLUMNS, len(sums))).indices
        self._sums[name] = sums
        self._load.columns[name] = (chosen, weight.detach()[:, chosen].clone())

    def _settle(self, copies: Copies) -> None:
        """Keep what is needed to compare again later: numbers and a few columns."""
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            written = copies.of(parameter)
            if written is not None:
                self._load.expected[name] = written
        used = copies.used
        before, self.sent = self.sent, copies.sent
        self._ignored = [name for name in self.sent if name not in used]
        self._unused = [n for n in self._ignored if before.get(n, self.sent[n]) != self.sent[n]]

    # -- comparing -------------------------------------------------------------------------

    @torch.inference_mode()
    def report(self) -> dict[str, Any]:
        """What does not hold, by the engine's names.

        Returns:
            ``stale``, weights that are not what was sent; ``missing``, weights that were not sent;
            ``unused``, names that changed and were copied nowhere by this process;
            ``not_compared``, layers; ``tensors``, how many were sent.
        """
        stale, missing, other = set(self._load.wrong), set(self._load.absent), set()
        module: Any
        for name, module in self._model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{key}"
                if parameter.numel() == 0 or (_has_experts(module) and "_weight" in key):
                    continue
                if full not in self._load.expected:
                    missing.add(full)
                elif not self._load.expected[full].agrees(checksum(parameter)):
                    stale.add(full)
            if _is_linear(module) or name in self._load.columns:
                if name not in self._load.columns:
                    if module.weight.numel() == 0:
                        missing.add(f"{name}.weight")
                        continue
                    self._choose_columns(name, module.weight)
                if not self._computes_with(name, module):
                    stale.add(f"{name}.weight")
            elif _has_experts(module):
                if name not in self._load.experts:
                    missing.add(f"{name}.w13_weight")
                elif not self._has_experts_of(name, module):
                    stale.add(f"{name}.w13_weight")
            elif _is_opaque(module):
                other.add(name)
        return {
            "stale": sorted(stale),
            "missing": sorted(missing),
            "unused": self._unused,
            "not_compared": sorted(other),
            "tensors": len(self.sent),
        }

    def explain(self, tensors: Tensors) -> str:
        """Compare once more, after log-probs that differ.

        Args:
            tensors: the trainer's, as it has them now.
        """
        now = {name: checksum(tensor) for name, tensor in tensors}
        report = self.report()
        found = fault([report])
        if found is not None:
            return f"the engine: {found}"
        differ = sorted(n for n in now.keys() | self.sent.keys() if now.get(n) != self.sent.get(n))
        if differ:
            return f"the trainer's weights are no longer what was sent: {', '.join(differ[:8])}"
        dtype = str(self._dtype).removeprefix("torch.")
        left = report["not_compared"]
        if self._ignored:
            return f"the engine has no place for {', '.join(self._ignored[:8])}"
        return (
            f"the engine has what was sent, {len(now)} tensors, "
            + (f"as far as could be found out (not in {', '.join(left[:8])}), " if left else "")
            + f"so it computes otherwise than the trainer (its dtype is {dtype})"
        )

    def _computes_with(self, name: str, module: Any) -> bool:
        """Whether a linear layer's products with unit vectors are the columns of its weight."""
        chosen, columns = self._load.columns[name]
        width = len(self._sums[name])
        units = torch.zeros(len(chosen), width, dtype=columns.dtype, device=columns.device)
        units[torch.arange(len(chosen)), chosen] = 1.0
        product = module.quant_method.apply(module, units).t()[: len(columns)]
        if torch.equal(product.to(columns.dtype), columns):
            self._exact.add(name)
            return True
        # A kernel that rounds what it multiplies is never exact.
        return name not in self._exact and _is_close(product, columns, 2**-7)

    def _has_experts_of(self, name: str, module: Any) -> bool:
        outputs, elements = self._load.experts[name]
        if (checksum(module.w13_weight) + checksum(module.w2_weight)) % 2**64 != elements:
            return False
        if module.w13_weight.device.type != "cpu":
            return True  # other kernels want to be called within a forward pass
        x, experts = _expert_inputs(module, self._dtype)
        weights = torch.ones(len(experts), 1, device=x.device)
        got = module.quant_method.apply(
            layer=module,
            x=x,
            topk_weights=weights,
            topk_ids=experts[:, None],
            shared_experts=None,
            shared_experts_input=None,
        )
        return _is_close(got, outputs, 1e-4 if self._dtype == torch.float32 else 2**-5)


def _is_close(got: Tensor, expected: Tensor, rounding: float) -> bool:
    bound = rounding * float(expected.float().abs().max())
    return bool(((got.float() - expected.float()).abs() <= bound).all())


def is_head(module: nn.Module) -> bool:
    """Whether it is a vLLM model's output layer."""
    return any(kind.__name__ == "ParallelLMHead" for kind in type(module).__mro__)


def _is_linear(module: Any) -> bool:
    """Whether it computes a product with a matrix, unquantized, by ``quant_method.apply``."""
    method = type(getattr(module, "quant_method", None)).__name__
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or (weight.dim() != 2 and weight.numel()):
        return False
    if method == "UnquantizedEmbeddingMethod":
        return is_head(module)  # embeddings are looked up instead
    return method == "UnquantizedLinearMethod"


def _has_experts(module: Any) -> bool:
    method = type(getattr(module, "quant_method", None)).__name__
    return method == "UnquantizedFusedMoEMethod" and module.activation.value in _ACTIVATIONS


def _is_opaque(module: Any) -> bool:
    """Whether a kernel may compute with something else than its visible parameters."""
    method = type(getattr(module, "quant_method", None)).__name__
    return method not in ("NoneType", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def _expert_inputs(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A vector for each of the experts that are here, and their numbers."""
    experts, _, width = layer.w13_weight.shape
    device = layer.w13_weight.device
    x = torch.sin(torch.arange(experts * width, device=device, dtype=torch.float32) + 1.0)
    mapped = layer.expert_map
    numbers = torch.arange(experts, device=device, dtype=torch.int32)
    if mapped is not None:
        numbers = torch.stack([(mapped == i).nonzero()[0, 0] for i in range(experts)]).int()
    return x.view(experts, width).to(dtype), numbers


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
}


def _expert_outputs(layer: Any, dtype: torch.dtype) -> Tensor:
    """What each expert makes of its vector, by the formula, from weights that were just loaded."""
    x, _ = _expert_inputs(layer, dtype)
    gate_up = torch.einsum("eij,ej->ei", layer.w13_weight.float(), x.float())
    if getattr(layer, "w13_bias", None) is not None:
        gate_up = gate_up + layer.w13_bias.float()
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = _ACTIVATIONS[layer.activation.value](gate) * up
    output = torch.einsum("eij,ej->ei", layer.w2_weight.float(), hidden)
    if getattr(layer, "w2_bias", None) is not None:
        output = output + layer.w2_bias.float()
    return output


def fault(reports: Iterable[dict[str, Any]]) -> str | None:
    """What is wrong with a load, in one sentence, from all workers' reports; ``None``: nothing."""
    reports = list(reports)
    if not all(isinstance(report, dict) for report in reports):
        return "its worker is of another version of this package, and did not compare"
    unused = set.intersection(*(set(report["unused"]) for report in reports))
    for names, what in (
        ({n for r in reports for n in r["stale"]}, "it does not compute with what was sent for"),
        ({n for r in reports for n in r["missing"]}, "nothing was sent for its"),
        (unused, "it has no place for the trainer's"),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
            return f"{what} {', '.join(listed[:8])}{more}"
    return None
