"""CoPRIS for PyTorch Lightning: concurrency-controlled partial rollouts with cross-stage IS.

The public names are imported on first use, so that worker processes that only score a reward
load neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copris_lightning.callbacks.ledger import TrajectoryLedger
    from copris_lightning.callbacks.progress import RolloutProgressBar
    from copris_lightning.callbacks.staleness import StalenessMonitor
    from copris_lightning.callbacks.summary import RunSummary
    from copris_lightning.callbacks.weight_sync import WeightSync
    from copris_lightning.core.corrections import LagRejection, Masking, Truncation
    from copris_lightning.core.losses import CispoLoss, ClippedPolicyLoss, PolicyLoss, ReinforceLoss
    from copris_lightning.core.penalties import KLPenalty
    from copris_lightning.core.ratios import (
        DecoupledRatio,
        SequenceRatio,
        TokenRatio,
        UncorrectedRatio,
    )
    from copris_lightning.datamodules.dataset import DatasetPrompts
    from copris_lightning.datamodules.rollout import RolloutDataModule
    from copris_lightning.datamodules.sampling import Evaluation, Sampling
    from copris_lightning.datamodules.template import Template
    from copris_lightning.lora import LoRA
    from copris_lightning.module import CoprisModule
    from copris_lightning.rollout.rewards import Prompt, Reward
    from copris_lightning.rollout.simulated import SimulatedEngine
    from copris_lightning.rollout.vllm import VLLMEngine
    from copris_lightning.rollout.vllm_server import VLLMServerEngine

_HOMES = {
    "CispoLoss": "core.losses",
    "ClippedPolicyLoss": "core.losses",
    "CoprisModule": "module",
    "DatasetPrompts": "datamodules.dataset",
    "DecoupledRatio": "core.ratios",
    "Evaluation": "datamodules.sampling",
    "KLPenalty": "core.penalties",
    "LagRejection": "core.corrections",
    "LoRA": "lora",
    "Masking": "core.corrections",
    "PolicyLoss": "core.losses",
    "Prompt": "rollout.rewards",
    "ReinforceLoss": "core.losses",
    "Reward": "rollout.rewards",
    "RolloutDataModule": "datamodules.rollout",
    "RolloutProgressBar": "callbacks.progress",
    "RunSummary": "callbacks.summary",
    "Sampling": "datamodules.sampling",
    "SequenceRatio": "core.ratios",
    "SimulatedEngine": "rollout.simulated",
    "StalenessMonitor": "callbacks.staleness",
    "Template": "datamodules.template",
    "TokenRatio": "core.ratios",
    "TrajectoryLedger": "callbacks.ledger",
    "Truncation": "core.corrections",
    "UncorrectedRatio": "core.ratios",
    "VLLMEngine": "rollout.vllm",
    "VLLMServerEngine": "rollout.vllm_server",
    "WeightSync": "callbacks.weight_sync",
}

__all__ = [
    "CispoLoss",
    "ClippedPolicyLoss",
    "CoprisModule",
    "DatasetPrompts",
    "DecoupledRatio",
    "Evaluation",
    "KLPenalty",
    "LagRejection",
    "LoRA",
    "Masking",
    "PolicyLoss",
    "Prompt",
    "ReinforceLoss",
    "Reward",
    "RolloutDataModule",
    "RolloutProgressBar",
    "RunSummary",
    "Sampling",
    "SequenceRatio",
    "SimulatedEngine",
    "StalenessMonitor",
    "Template",
    "TokenRatio",
    "TrajectoryLedger",
    "Truncation",
    "UncorrectedRatio",
    "VLLMEngine",
    "VLLMServerEngine",
    "WeightSync",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
