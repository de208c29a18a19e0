"""Scoring finished responses off the event loop, in processes that can be stopped."""

from __future__ import annotations

import asyncio
import inspect
import math
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from pebble import ProcessPool

from copris_lightning.errors import ConfigurationError, RewardError
from copris_lightning.search_path import forget_own_safe_path


@dataclass(frozen=True, slots=True)
class Prompt:
    """One task for the model.

    Attributes:
        id: the user's name for it; appears in the ledger and in errors.
        text: the prompt as plain text; or
        messages: as chat messages, rendered by the tokenizer's chat template.
        answer: what the reward compares the response with.
        extra: further columns of the data set.
    """

    id: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    answer: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


Reward = Callable[[str, Prompt], Any]
"""A verifiable reward: ``reward(response, prompt)`` scores the response text (special tokens
dropped) with a number. ``None``, NaN and infinities say that there is no verdict: the trajectory is
quarantined. In YAML it is the ``class_path`` of a class with a ``__call__``.

A plain function or ``__call__`` runs in a worker process, which has a copy of its own; an
``async`` one (a judge behind a network, say) is awaited on the rollout's event loop.
"""


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


class RewardScorer:
    """Calls a reward with a time limit, and turns whatever goes wrong into a RewardError.

    Args:
        reward: the user's reward.
        timeout_s: limit on one call, in seconds; a worker past it is killed.
        workers: processes for a reward that is not a coroutine.

    Raises:
        ConfigurationError: not callable, cannot be sent to a process, or a limit below its
            minimum.
    """

    def __init__(self, reward: Reward, *, timeout_s: float = 30.0, workers: int = 1) -> None:
        if isinstance(reward, type) or not callable(reward):
            raise ConfigurationError(
                f"data.init_args.reward: {reward!r} is not callable; give an instance whose "
                "__call__(response: str, prompt: Prompt) returns a float"
            )
        if not timeout_s > 0:
            raise ConfigurationError(f"data.init_args.reward_timeout_s={timeout_s} must be above 0")
        if workers < 1:
            raise ConfigurationError(f"data.init_args.reward_workers={workers} must be at least 1")
        self._is_async = any(map(inspect.iscoroutinefunction, (reward, type(reward).__call__)))
        if not self._is_async:
            try:
                pickle.dumps(reward)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ConfigurationError(
                    f"data.init_args.reward: {reward!r} cannot be sent to a worker process "
                    f"({error}); define it at the top level of a module, or make __call__ async"
                ) from error
        self._reward = reward
        self._timeout_s = timeout_s
        self._workers = workers
        self._pool: _RewardProcesses | None = None

    @property
    def name(self) -> str:
        """The reward's class or function, for messages."""
        reward: Any = self._reward
        return str(getattr(reward, "__qualname__", type(reward).__qualname__))

    async def start(self) -> None:
        """Start the worker processes and have them import the reward, so that the first stage does
        not go on past its end while the first rewards wait for that."""
        if not self._is_async:
            loop = asyncio.get_running_loop()
            pool = self._processes()
            await asyncio.gather(
                *(loop.run_in_executor(pool, _nothing) for _ in range(self._workers))
            )

    async def __call__(self, response: str, prompt: Prompt) -> float:
        """The reward of one response; NaN where the reward returned ``None``.

        Raises:
            RewardError: names the prompt; its cause is the reward's own error.
        """
        # A worker process has its limit from the pool.
        limit = asyncio.timeout(self._timeout_s if self._is_async else None)
        try:
            async with limit:
                value = await self._call(response, prompt)
        except Exception as error:  # a user's code may raise anything: it is passed on as cause
            if isinstance(error, TimeoutError) and (limit.expired() or not self._is_async):
                raise RewardError(
                    f"the reward of prompt {prompt.id!r} took longer than "
                    f"data.init_args.reward_timeout_s={self._timeout_s}"
                ) from error
            raise RewardError(f"the reward of prompt {prompt.id!r} raised {error!r}") from error
        if value is None:
            return math.nan
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise RewardError(
                f"the reward of prompt {prompt.id!r} returned {value!r}, not a number"
            ) from error

    async def _call(self, response: str, prompt: Prompt) -> Any:
        if self._is_async:
            return await self._reward(response, prompt)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._processes(), self._reward, response, prompt)

    def _processes(self) -> _RewardProcesses:
        if self._pool is None:
            self._pool = _RewardProcesses(self._reward, self._workers, self._timeout_s)
        return self._pool

    def close(self) -> None:
        """End the worker processes. May be called twice."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class _RewardProcesses(Executor):
    """pebble's process pool as an asyncio executor: it can kill a call that takes too long.

    Every worker gets its own copy of the reward once, when it starts.
    """

    def __init__(self, reward: Reward, workers: int, timeout_s: float) -> None:
        # Forking is unsafe beside the engine's and torch's threads, hence "spawn".
        self._pool = ProcessPool(
            max_workers=workers,
            initializer=_receive,
            initargs=(reward,),
            context=multiprocessing.get_context("spawn"),
        )
        self._timeout_s = timeout_s

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call the workers' copy of the reward (``fn`` is the original) or of a plain function."""
        call = fn if fn is _nothing else _call_received
        future: Future[Any] = self._pool.schedule(
            call, args=args, kwargs=kwargs, timeout=self._timeout_s
        )
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        self._pool.stop()
        self._pool.join()


_received: list[Reward] = []
"""In a worker: its copy of the reward."""


def _receive(reward: Reward) -> None:
    forget_own_safe_path()
    _received[:] = [reward]


def _call_received(response: str, prompt: Prompt) -> Any:
    return _received[0](response, prompt)


def _nothing() -> None:
    """What a worker does first: it has started, and imported the reward, when this returns."""
