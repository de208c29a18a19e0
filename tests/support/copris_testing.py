"""Classes that tests hand to other processes, which import them from here by name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from copris_lightning.core.saved import SavedGroups
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.engines.vllm_worker import CoprisWorkerExtension
from copris_lightning.rollout.rewards import Prompt


class SomePrompts:
    """Short prompts of a tiny model's characters."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Prompt:
        return Prompt(f"p{index:03d}", text=f"{index}+{index % 7}=")


class SaveBatches(L.Callback):
    """Saves each batch's trajectories, the weights they were trained on, the loss, and a digest of
    each weight afterwards: everything in full, whatever the ranks."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.before: dict[str, torch.Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self.before is None:
            self.before = full_state(pl_module.policy.model)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not batch.is_last:
            return
        feed = trainer.datamodule.feed
        after = full_state(pl_module.policy.model)
        if trainer.is_global_zero:
            saved = {
                "groups": SavedGroups.of(feed.batch.groups).state_dict(),
                "policy_version": batch.policy_version,
                "before": self.before,
                "loss": float(trainer.callback_metrics["train/loss"]),
                "after": {name: digest(tensor) for name, tensor in after.items()},
            }
            torch.save(saved, self.directory / f"batch_{feed.batch.index}.pt")
        self.before = None


def full_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's weights in full, on rank 0; all ranks must ask."""
    split = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if split:
        import deepspeed

        with deepspeed.zero.GatheredParameters(split):
            return {n: t.clone() for n, t in model.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {n: t.clone() for n, t in get_model_state_dict(model, options=options).items()}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.clone().float().numpy().tobytes()).hexdigest()


class RecordingExtension(CoprisWorkerExtension):
    """Writes down a digest of each weight that arrives in the worker, a line a shard."""

    def load_shard(self, path: str) -> None:
        with safe_open(path, framework="pt") as file:
            digests = {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        with open(os.environ["COPRIS_TEST_RECORD"], "a") as record:
            record.write(json.dumps(digests) + "\n")
        super().load_shard(path)


class RecordingEngine(VLLMEngine):
    """A vLLM engine that says which weights it was given."""

    worker_extension: ClassVar[str] = "copris_testing.RecordingExtension"


class StaleHeadExtension(CoprisWorkerExtension):
    """Loads weights without repairing the tied head."""

    def _repack_tied_head(self) -> None:
        pass


class StaleHeadEngine(VLLMEngine):
    """A vLLM engine whose syncs leave the tied head with the old weights."""

    worker_extension: ClassVar[str] = "copris_testing.StaleHeadExtension"


def reference_logprobs(
    model: Any, tokens: list[int], first: int, temperature: float = 1.0
) -> torch.Tensor:
    """transformers' log-probs of ``tokens[first:]``, in one forward pass over the whole."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, first - 1 : -1] / temperature
    targets = torch.tensor(tokens[first:])
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
