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
    from copris_lightning.core.estimator.corrections import LagRejection, Masking, Truncation
    from copris_lightning.core.estimator.estimator import Estimator
    from copris_lightning.core.estimator.losses import (
        CispoLoss,
        ClippedPolicyLoss,
        PolicyLoss,
        ReinforceLoss,
    )
    from copris_lightning.core.estimator.penalties import KLPenalty
    from copris_lightning.core.estimator.ratios import (
        DecoupledRatio,
        SequenceRatio,
        TokenRatio,
        UncorrectedRatio,
    )
    from copris_lightning.core.sampling import Sampling
    from copris_lightning.datamodules.prompts.dataset import Columns, DatasetPrompts
    from copris_lightning.datamodules.prompts.template import Template
    from copris_lightning.datamodules.rollout import RolloutDataModule
    from copris_lightning.datamodules.settings import BatchSize, Credit, Evaluation, Flow, Task
    from copris_lightning.engines.server import VLLMServerEngine
    from copris_lightning.engines.simulated import SimulatedEngine
    from copris_lightning.engines.vllm import VLLMEngine
    from copris_lightning.policy.lora import LoRA
    from copris_lightning.policy.module import CoprisModule
    from copris_lightning.policy.settings import Memory, Precision
    from copris_lightning.rollout.rewards import Prompt, Reward, Scoring

_HOMES = {
    "BatchSize": "datamodules.settings",
    "CispoLoss": "core.estimator.losses",
    "ClippedPolicyLoss": "core.estimator.losses",
    "Columns": "datamodules.prompts.dataset",
    "CoprisModule": "policy.module",
    "Credit": "datamodules.settings",
    "DatasetPrompts": "datamodules.prompts.dataset",
    "DecoupledRatio": "core.estimator.ratios",
    "Estimator": "core.estimator.estimator",
    "Evaluation": "datamodules.settings",
    "Flow": "datamodules.settings",
    "KLPenalty": "core.estimator.penalties",
    "LagRejection": "core.estimator.corrections",
    "LoRA": "policy.lora",
    "Masking": "core.estimator.corrections",
    "Memory": "policy.settings",
    "PolicyLoss": "core.estimator.losses",
    "Precision": "policy.settings",
    "Prompt": "rollout.rewards",
    "ReinforceLoss": "core.estimator.losses",
    "Reward": "rollout.rewards",
    "RolloutDataModule": "datamodules.rollout",
    "RolloutProgressBar": "callbacks.progress",
    "RunSummary": "callbacks.summary",
    "Sampling": "core.sampling",
    "Scoring": "rollout.rewards",
    "SequenceRatio": "core.estimator.ratios",
    "SimulatedEngine": "engines.simulated",
    "StalenessMonitor": "callbacks.staleness",
    "Task": "datamodules.settings",
    "Template": "datamodules.prompts.template",
    "TokenRatio": "core.estimator.ratios",
    "TrajectoryLedger": "callbacks.ledger",
    "Truncation": "core.estimator.corrections",
    "UncorrectedRatio": "core.estimator.ratios",
    "VLLMEngine": "engines.vllm",
    "VLLMServerEngine": "engines.server",
    "WeightSync": "callbacks.weight_sync",
}

__all__ = [
    "BatchSize",
    "CispoLoss",
    "ClippedPolicyLoss",
    "Columns",
    "CoprisModule",
    "Credit",
    "DatasetPrompts",
    "DecoupledRatio",
    "Estimator",
    "Evaluation",
    "Flow",
    "KLPenalty",
    "LagRejection",
    "LoRA",
    "Masking",
    "Memory",
    "PolicyLoss",
    "Precision",
    "Prompt",
    "ReinforceLoss",
    "Reward",
    "RolloutDataModule",
    "RolloutProgressBar",
    "RunSummary",
    "Sampling",
    "Scoring",
    "SequenceRatio",
    "SimulatedEngine",
    "StalenessMonitor",
    "Task",
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
