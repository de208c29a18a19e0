"""DeepSpeed's ZeRO: weights that it splits as they are made, and settings that cannot work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from copris_lightning.errors import ConfigurationError

_CONFIG = "trainer.strategy.init_args.config"

_SET_ELSEWHERE = {
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
}
"""Keys of DeepSpeed's config, and where they are set here."""


@contextmanager
def splitting(strategy: Any) -> Iterator[None]:
    """Within the block ``from_pretrained`` fills weights that ZeRO-3 splits, if ``strategy`` does.

    Not longer: while transformers knows a config of DeepSpeed's, it splits every model it makes.
    """
    if not (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(strategy.config)  # known for as long as it lives
    try:
        yield
    finally:
        del config


@contextmanager
def whole(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block parameters are whole, and what rank 0 writes into them stays.

    ZeRO-3 splits weights as soon as they are made; what writes into one then writes nowhere.
    """
    split = _split(parameters)
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split, modifier_rank=0):
        yield


def hold(owner: nn.Module, module: nn.Module) -> None:
    """Have ZeRO-3 put a module's weights together for as long as ``owner`` computes."""
    split = _split(module.parameters())
    if split:
        import deepspeed

        for parameter in split:
            deepspeed.zero.register_external_parameter(owner, parameter)


def unhooked(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module that ranks may call as often as each needs to; see :func:`hold`.

    ZeRO-3 gathers weights whenever a module is called, which takes all ranks: where one calls it
    more often than another, both wait for ever.
    """
    call: Callable[[Tensor], Tensor] = module.forward if _split(module.parameters()) else module
    return call


def _split(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if hasattr(p, "ds_id")]


def check_zero(trainer: L.Trainer, strategy: DeepSpeedStrategy) -> None:
    """Refuse what DeepSpeed refuses later, or does otherwise than the other settings say.

    Raises:
        ConfigurationError: names the setting to change.
    """
    config: Any = strategy.config
    module: Any = trainer.lightning_module
    for key, ours in _SET_ELSEWHERE.items():
        # Lightning puts the last two there itself, once.
        if key in config and not strategy._config_initialized:
            raise ConfigurationError(f"{_CONFIG}: {key}={config[key]!r} is not read; set {ours}")
    if trainer.gradient_clip_algorithm == "value":
        raise ConfigurationError(
            "trainer.gradient_clip_algorithm=value cannot be had with DeepSpeed; use norm"
        )
    if trainer.precision == "32-true" and module.precision.dtype != "float32":
        raise ConfigurationError(
            f"precision.dtype={module.precision.dtype}: DeepSpeed makes weights what "
            "trainer.precision=32-true says; set dtype=float32, or trainer.precision=bf16-mixed"
        )
    _check_offload(module, config.get("zero_optimization") or {})
    # Lightning warns that CoprisModule has the method that clips; DeepSpeed clips all the same.
    warnings.filterwarnings("ignore", message="Since DeepSpeed handles gradient clipping")
    if not strategy.zero_stage_3:
        return
    kl = module.estimator.kl
    if kl is not None and (module.lora is None or kl.reference is not None):
        raise ConfigurationError(
            "estimator.kl: DeepSpeed's ZeRO-3 cannot hold a reference policy, which is not "
            "trained; use ModelParallelStrategy (FSDP2) or deepspeed_stage_2, or train adapters "
            "(lora), for which the reference is the model without them"
        )
    assert trainer.state.fn is not None
    if trainer.state.fn != TrainerFn.FITTING:
        raise ConfigurationError(
            "trainer.strategy: DeepSpeed's ZeRO-3 loads its checkpoints for training only, not to "
            f"{trainer.state.fn.value}; make one file of it with lightning.pytorch.utilities."
            "deepspeed.convert_zero_checkpoint_to_fp32_state_dict(DIRECTORY, FILE), and use "
            "trainer.strategy=auto and ckpt_path=FILE"
        )


def _check_offload(module: Any, zero: dict[str, Any]) -> None:
    """DeepSpeed keeps an optimizer's states on the host only with an optimizer of its own."""
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    if device == "none":
        return
    optimizer = type(module.optimizer(iter([nn.Parameter(torch.zeros(1))])))
    if not optimizer.__module__.startswith("deepspeed."):
        raise ConfigurationError(
            f"trainer.strategy: offload_optimizer to {device} with "
            f"optimizer={optimizer.__name__}, which DeepSpeed refuses; set optimizer to "
            "deepspeed.ops.adam.DeepSpeedCPUAdam, or do not offload"
        )
