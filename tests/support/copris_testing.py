"""Classes that tests hand to other processes, which import them from here by name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.vllm import VLLMEngine
from copris_lightning.rollout.vllm_worker import CoprisWorkerExtension


class SomePrompts:
    """Short prompts of a tiny model's characters."""

    def __init__(self, size: int = 64) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Prompt:
        return Prompt(f"p{index:03d}", text=f"{index}+{index % 7}=")


class ShareOfDigits:
    """A reward that varies on random text: the share of digits in the response."""

    def __call__(self, response: str, prompt: Prompt) -> float:
        return sum(c.isdigit() for c in response) / max(1, len(response))


class FailingReward:
    """Works for a while (each worker counts its own calls), then raises."""

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.calls = 0

    def __call__(self, response: str, prompt: Prompt) -> float:
        self.calls += 1
        if self.calls > self.after:
            raise KeyError("the answer is missing")
        return 0.0


class StaleHeadExtension(CoprisWorkerExtension):
    """Loads weights without repairing the tied head."""

    def load_trainer_weights(self, path: str) -> None:
        self._reload(path)


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
