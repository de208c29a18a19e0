"""A policy draws no random numbers: the engine has no dropout, and a policy with it is not the one
that is synced.

Models take their noise from the config, as modules (``nn.Dropout``), as arguments of functions
(``nn.functional.dropout(x, p=self.dropout, training=self.training)``) or by leaving layers out. The
eval mode would switch all of it off, and gradient checkpointing with it; so rates are zero instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_NOISE = ("drop", "jitter")
"""Parts of the names of rates: ``attention_dropout``, ``resid_pdrop``, ``layerdrop``,
``drop_path_rate``, ``router_jitter_noise``, ``moe_jitter_eps``, ..."""


def without_noise(config: Any) -> Any:
    """A model's config, with the rate of everything random set to zero, in place."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_noise(value)
        elif _is_rate(name, value):
            setattr(config, name, 0.0)
    return config


def silence(model: nn.Module) -> None:
    """Set the rates that a model's modules hold to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_rate(name, value):
                setattr(module, name, 0.0)


def _is_rate(name: str, value: Any) -> bool:
    return isinstance(value, float) and any(part in name for part in _NOISE)


def largest_difference(first: Tensor, second: Tensor) -> float:
    """Of two answers ``[B, R]``; infinite where only one is a number."""
    difference = (first - second).abs()
    difference[first.isnan() & second.isnan()] = 0.0
    return float(difference.nan_to_num(nan=torch.inf).max()) if difference.numel() else 0.0


def first_random_module(model: nn.Module, ask: Callable[[], object]) -> str:
    """Name and class of the innermost module whose output differs first between two passes.

    Args:
        model: whose modules.
        ask: one forward pass.
    """
    passes: list[list[tuple[str, float]]] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and output:
            output = output[0]
        if isinstance(output, Tensor):
            passes[-1].append((names[module], float(output.detach().double().abs().sum())))

    hooks = [module.register_forward_hook(note) for module in names]
    try:
        for _ in range(2):
            passes.append([])
            ask()
    finally:
        for hook in hooks:
            hook.remove()
    for (name, one), (other_name, other) in zip(*passes, strict=False):
        if name != other_name or one != other:
            return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"
    return "no module by itself"


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block all of a model's modules are in training mode."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
