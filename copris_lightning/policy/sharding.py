"""How strategies split the policy's weights over ranks, and how they are put together again."""

from __future__ import annotations

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
from torch.distributed.fsdp import fully_shard

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
