"""Weights sent to a booted engine, as a sync does it, for tests that have no trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from copris_lightning.engines.engine import Engine


def send(engine: Engine, call: Callable[..., Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Have a held engine load weights.

    Args:
        engine: takes them as its transport brings them.
        call: runs a coroutine on the engine's loop.
        weights: names and tensors.
    """
    tensors = list(weights)
    transport = engine.transport(0, call)
    try:
        transport.send(lambda: iter(tensors))
    finally:
        transport.close()


def sync(
    engine: Engine,
    call: Callable[..., Any],
    weights: Iterable[tuple[str, Tensor]],
    version: int | None = None,
) -> int:
    """Hold, send, release; returns the new version, by default the next."""
    version = engine.version + 1 if version is None else version
    call(engine.hold())
    send(engine, call, weights)
    call(engine.release(version))
    return version


def changed(model: nn.Module) -> nn.Module:
    """The model as another policy: each of its parameters moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
