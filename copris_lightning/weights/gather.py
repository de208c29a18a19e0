"""Weights that a strategy has split over ranks, put together again, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def full_weights(model: nn.Module, root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each of a model's weights in full, one at a time, under its name; tied ones once.

    Putting weights together takes all ranks: each has to go through all of them. With FSDP1 it is
    one unit at a time instead. A tensor may be gone when the next one is asked for.

    Args:
        model: whose weights.
        root: what the strategy made of the module that holds it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass leaves the last unit as the kernels need it
    units = FullyShardedDataParallel.fsdp_modules(root)
    for unit in units:
        yield from _unit_weights(model, unit)
    if units:
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter.full_tensor().detach()
        elif hasattr(parameter, "ds_id"):  # split by DeepSpeed's ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()
        else:
            yield name, parameter.detach()


def _unit_weights(model: nn.Module, unit: FullyShardedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """The weights of an FSDP1 unit that are in no unit within it."""
    inner = [m for m in FullyShardedDataParallel.fsdp_modules(unit) if m is not unit]
    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
        own = {id(p) for p in unit.parameters()} - {id(p) for m in inner for p in m.parameters()}
        for name, parameter in model.named_parameters():
            if id(parameter) in own:
                yield name.replace("_fsdp_wrapped_module.", ""), parameter.detach()
