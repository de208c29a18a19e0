"""What a reward is, and scoring finished responses with it in processes that can be stopped.

A worker process imports this module for :class:`Prompt`, so nothing heavy is imported here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from copris_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from copris_lightning.rollout.reward_workers import RewardWorkers


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task for the model.

    Attributes:
        id: the user's name for it; appears in the ledger and in errors.
        text: the prompt as plain text; or
        messages: as chat messages, rendered by the tokenizer's chat template.
        answer: what the reward compares the response with. From a data set it is text, lists and
            objects whose leaves are text, or ``None`` (see :class:`DatasetPrompts`); a prompt
            source of the user's own may give anything that can be pickled.
        extra: further columns of the data set.
    """

    id: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    answer: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


Reward = Callable[[str, Prompt], Any]
"""A verifiable reward: ``reward(response, prompt)`` scores the response text (without the model's
own end) with a number: Python's, numpy's, or a tensor of one element. ``None``, NaN and infinities
say that there is no verdict: the trajectory is quarantined. In YAML it is the ``class_path`` of a
class with a ``__call__``.

Whatever the engine, it runs on the main thread of a worker process, which has a copy of its own. A
plain function or ``__call__`` is called there, one response at a time; an ``async`` one (a judge
behind a network, say) is awaited on one event loop, any number of responses at a time.

What it prints is shown on the error output; of many lines, some, and how many there were.
"""


_MOST_WORKERS = 1024
"""Some hundred processes keep any machine busy; above are typing errors."""


class BoxedMatch:
    """1.0 if the response's last ``\\boxed{...}`` is the answer, character for character.

    Spaces and dollar signs are not compared. For answers that can be written in several ways, use
    a verifier that knows them.
    """

    def __call__(self, response: str, prompt: Prompt) -> float:
        """The reward, 0.0 or 1.0."""
        boxed = _last_boxed(response)
        return float(boxed is not None and _plain(boxed) == _plain(str(prompt.answer)))


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def _plain(text: str) -> str:
    return text.replace(" ", "").replace("$", "")


@dataclass(frozen=True)
class Scoring:
    """The reward and the processes that compute it.

    Attributes:
        reward: scores a response; see :data:`Reward`.
        workers: processes; each does one call at a time, or for an ``async`` reward any number.
        timeout_s: limit on one call, in seconds from when a worker begins it (real ones, also where
            the engine's clock is virtual); a worker past it is killed.

    Raises:
        ConfigurationError: not callable, cannot be sent to a process, or a number out of range.
    """

    reward: Reward
    workers: int = 1
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        from copris_lightning.rollout.spawning import pickled_for_workers

        if isinstance(self.reward, type) or not callable(self.reward):
            raise ConfigurationError(
                f"reward: {self.reward!r} is not callable; give an instance whose "
                "__call__(response: str, prompt: Prompt) returns a float"
            )
        if not 0 < self.timeout_s < math.inf:
            raise ConfigurationError(f"timeout_s={self.timeout_s} must be a number above 0")
        if self.workers < 1:
            raise ConfigurationError(f"workers={self.workers} must be at least 1")
        if self.workers > _MOST_WORKERS:
            raise ConfigurationError(
                f"workers={self.workers} must be at most {_MOST_WORKERS}: each is a process"
            )
        pickled_for_workers(self.reward)

    @property
    def name(self) -> str:
        """The reward's class or function, for messages."""
        reward: Any = self.reward
        return str(getattr(reward, "__qualname__", type(reward).__qualname__))


class RewardScorer:
    """Has a reward called in worker processes, with a time limit.

    Args:
        scoring: which, and how.
    """

    start_s = 180.0
    """How long a worker may take to start and to import the reward, in seconds."""

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self._pool: RewardWorkers | None = None

    @property
    def name(self) -> str:
        """The reward's class or function, for messages."""
        return self._scoring.name

    async def start(self) -> None:
        """Start the worker processes and have them import the reward.

        Raises:
            ConfigurationError: they cannot.
        """
        from asyncio import get_running_loop

        from copris_lightning.rollout.reward_workers import begin

        await get_running_loop().run_in_executor(self._processes(), begin)

    async def __call__(self, response: str, prompt: Prompt) -> float:
        """The reward of one response; NaN where the reward returned ``None``.

        Raises:
            RewardError: names the prompt; its cause is the reward's own error.
            ConfigurationError: the worker processes cannot import the reward.
        """
        from asyncio import get_running_loop

        from copris_lightning.rollout.reward_workers import score

        loop = get_running_loop()
        return await loop.run_in_executor(self._processes(), score, response, prompt)

    def _processes(self) -> RewardWorkers:
        if self._pool is None:
            from copris_lightning.rollout.reward_worker import Work
            from copris_lightning.rollout.reward_workers import RewardWorkers
            from copris_lightning.rollout.spawning import pickled_for_workers

            reward, timeout_s = self._scoring.reward, self._scoring.timeout_s
            is_async = any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))
            pickled = pickled_for_workers(reward)
            work = Work(pickled, self.name, is_async, timeout_s, self.start_s)
            self._pool = RewardWorkers(work, self._scoring.workers)
        return self._pool

    def close(self) -> None:
        """End the worker processes. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
