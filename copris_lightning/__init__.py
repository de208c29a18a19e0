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
    from copris_lightning.core.losses import ClippedPolicyLoss
    from copris_lightning.datamodules.prompts import DatasetPrompts
    from copris_lightning.datamodules.rollout import RolloutDataModule
    from copris_lightning.module import CoprisModule
    from copris_lightning.rollout.rewards import Prompt, Reward
    from copris_lightning.rollout.simulated import SimulatedEngine
    from copris_lightning.rollout.vllm import VLLMEngine

_HOMES = {
    "ClippedPolicyLoss": "core.losses",
    "CoprisModule": "module",
    "DatasetPrompts": "datamodules.prompts",
    "Prompt": "rollout.rewards",
    "Reward": "rollout.rewards",
    "RolloutDataModule": "datamodules.rollout",
    "RolloutProgressBar": "callbacks.progress",
    "RunSummary": "callbacks.summary",
    "SimulatedEngine": "rollout.simulated",
    "StalenessMonitor": "callbacks.staleness",
    "TrajectoryLedger": "callbacks.ledger",
    "VLLMEngine": "rollout.vllm",
    "WeightSync": "callbacks.weight_sync",
}

__all__ = [
    "ClippedPolicyLoss",
    "CoprisModule",
    "DatasetPrompts",
    "Prompt",
    "Reward",
    "RolloutDataModule",
    "RolloutProgressBar",
    "RunSummary",
    "SimulatedEngine",
    "StalenessMonitor",
    "TrajectoryLedger",
    "VLLMEngine",
    "WeightSync",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
