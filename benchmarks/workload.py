"""What the benchmarks roll out: prompts without end, and engines on which every response has a
length of its own that does not depend on the engine."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from copris_lightning.engines.engine import Chunk, GenerationRequest
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.task import QueuedPrompt

PROMPT_TOKENS = 16
"""Of every prompt."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal response lengths, in tokens."""

    median: float
    sigma: float
    limit: int

    def __call__(self, seed: int) -> int:
        """Of the trajectory with this seed, which is 63 random bits."""
        drawn = NormalDist().inv_cdf((seed + 0.5) / 2**63)
        return min(self.limit, max(1, round(self.median * math.exp(self.sigma * drawn))))


class Replayed:
    """Over an engine: each response ends at its own length; and what resuming costs is counted.

    Attributes:
        length_of: of the response of a seed, in tokens.
        sent_again: tokens of prefixes, prompts included, with which responses went on.
        cached: of these, tokens whose keys and values the engine still had.
    """

    length_of: Lengths
    sent_again = 0
    cached = 0

    def replayed(self, request: GenerationRequest) -> GenerationRequest:
        """The request, with the tokens that its response lacks as its budget."""
        made = len(request.token_ids) - PROMPT_TOKENS
        if made:
            self.sent_again += len(request.token_ids)
        return replace(request, max_new_tokens=self.length_of(request.seed) - made)


class ReplayedVLLM(Replayed, VLLMEngine):
    """vLLM's engine, which tells with a request's first output what it had cached."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return super().stream(self.replayed(request))

    async def _outputs(
        self, token_ids: Sequence[int], params: Any, request_id: str
    ) -> AsyncGenerator[tuple[Any, int], None]:
        is_first = len(token_ids) > PROMPT_TOKENS
        async with aclosing(super()._outputs(token_ids, params, request_id)) as outputs:
            async for output, started in outputs:
                if is_first:
                    self.cached += output.num_cached_tokens or 0
                    is_first = False
                yield output, started


class ReplayedSimulation(Replayed, SimulatedEngine):
    """The simulated engine, which has no keys and values to compute."""

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        return super().stream(self.replayed(request))


class Prompts:
    """Random tokens, another prompt each time."""

    def __init__(self) -> None:
        self.taken = 0

    def next(self) -> QueuedPrompt:
        self.taken += 1
        tokens = tuple((self.taken >> i) % 64 + 2 for i in range(PROMPT_TOKENS))
        return QueuedPrompt(self.prompt(self.taken), self.taken, tokens)

    def prompt(self, index: int) -> Prompt:
        return Prompt(f"p{index}", text="")

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}
