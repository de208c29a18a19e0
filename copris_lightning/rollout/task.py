"""What is to be rolled out: where its prompts come from, how they are answered and judged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol

from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.engines.engine import Decoding
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.stops import StopStrings


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A prompt ready for the engine: the user's prompt, its place in the source, its tokens."""

    prompt: Prompt
    index: int
    token_ids: tuple[int, ...]


class PromptQueue(Protocol):
    """Where fresh prompts come from."""

    def next(self) -> QueuedPrompt | None:
        """The next prompt, or ``None`` when there are no more."""
        ...

    def prompt(self, index: int) -> Prompt:
        """A prompt taken before, for its reward (also after a restore)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """How far it is, as plain values."""
        ...


Scorer = Callable[[str, Prompt], Awaitable[float]]
Decoder = Callable[[Sequence[int]], str]
Accept = Callable[[PromptGroup], bool]


@dataclass(frozen=True, slots=True)
class Task:
    """One training's or evaluation's work on an engine.

    Attributes:
        prompts: where fresh prompts come from.
        scorer: ``await scorer(response_text, prompt)`` gives the reward.
        decode: response token ids to text, for the scorer only.
        decoding: how the engine is to choose tokens, and whether it is asked for log-probs. It
            stops at the buffer's stop tokens, whatever stands here.
        stops: strings that end a response, too.
        accept: whether a complete group may be trained on; one that may not is dropped, and a
            fresh prompt takes its place. What it raises ends the stage.
        seed: of the requests' seeds.
        name: begins every request id, so that two tasks can share an engine.
    """

    prompts: PromptQueue
    scorer: Scorer
    decode: Decoder
    decoding: Decoding = field(default_factory=Decoding)
    stops: StopStrings | None = None
    accept: Accept = lambda group: True
    seed: int = 0
    name: str = "train"


def trajectory_seed(seed: int, group_id: int, sample: int) -> int:
    """A 63-bit seed that differs for every trajectory of a run."""
    digest = blake2b(repr((seed, group_id, sample)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
