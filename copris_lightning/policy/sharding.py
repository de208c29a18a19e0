"""How strategies split the policy's weights over ranks, and how they are put together again."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

from copris_lightning.core.batching import MicroBatch
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.zero import check_zero

SUPPORTED = (
    SingleDeviceStrategy,
    DDPStrategy,
    ModelParallelStrategy,
    FSDPStrategy,
    DeepSpeedStrategy,
)


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse a strategy whose weights cannot be put together, before anything slow starts.

    Raises:
        ConfigurationError: names the setting to change.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SUPPORTED):
        raise ConfigurationError(
            f"trainer.strategy={type(strategy).__name__}: its weights cannot be synced; use auto, "
            "ddp, ModelParallelStrategy (FSDP2), fsdp, deepspeed_stage_2 or deepspeed_stage_3"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        check_zero(trainer, strategy)
    if isinstance(strategy, ModelParallelStrategy):
        size = strategy.device_mesh["tensor_parallel"].size()
        if size > 1:
            raise ConfigurationError(
                f"trainer.strategy.init_args.tensor_parallel_size={size} (auto is the devices of a "
                "node): the policy is split by FSDP2 only; set tensor_parallel_size=1 and "
                f"data_parallel_size={trainer.world_size}, the number of ranks"
            )


@torch.no_grad()
def score(trainer: L.Trainer, batch: MicroBatch) -> Tensor:
    """Log-probs of the response tokens under the current policy, ``[B, R]`` in fp32 on the CPU.

    With split weights this takes all ranks: each has to call it equally often.
    """
    strategy = trainer.strategy
    assert strategy.model is not None
    with trainer.precision_plugin.train_step_context():
        logprobs: Tensor = strategy.model(strategy.batch_to_device(batch))
    return logprobs.float().cpu()


def shard(policy: nn.Module, model: nn.Module, mesh: DeviceMesh) -> None:
    """Split weights over ranks with FSDP2: each decoder layer by itself, then the rest.

    Args:
        policy: the module that is called.
        model: the language model in it, which names the classes of its layers.
        mesh: of one dimension, the ranks.
    """
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)


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
