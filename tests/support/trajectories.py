"""Trajectories made by hand, and saved states made comparable."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from copris_lightning.core.outcome import Credit, Excluded, FinishReason, Verdict
from copris_lightning.core.trajectory import Trajectory

Written = tuple[int, Sequence[int], Sequence[float]]
"""Version, tokens and the engine's log-probs of a chunk."""


def trajectory(
    *chunks: Written,
    sample: int = 0,
    group: int = 0,
    prompt: Iterable[int] = (1,),
    limit: int = 99,
    trainer: Sequence[float] | None = None,
    end: FinishReason | None = None,
    reward: float | None = None,
    advantage: float | None = None,
    excluded: Excluded | None = None,
) -> Trajectory:
    """A trajectory of some chunks; with a reward it is finished (by ``"stop"`` if not told)."""
    made = Trajectory(group, sample, f"p{group}", tuple(prompt), limit)
    for version, tokens, logprobs in chunks:
        made.append(tokens, logprobs, version)
    if trainer is not None:
        made.add_logprobs("trainer", trainer)
    if end is not None or reward is not None:
        made.finish(end or "stop")
    if reward is not None:
        made.judge(Verdict.of(reward))
    if advantage is not None or excluded is not None:
        made.credit = Credit(advantage or 0.0, excluded)
    return made


def versions(made: Trajectory) -> list[int | None]:
    """The version of each token."""
    return [s.version for s in made.segments for _ in range(s.length)]


def single(values: Iterable[float]) -> list[float]:
    """Numbers as a column of log-probs holds them: rounded to four bytes."""
    return array("f", values).tolist()


def plain(state: Any) -> Any:
    """A saved state with lists for tensors, which can be compared."""
    if isinstance(state, torch.Tensor):
        return [str(state.dtype), state.tolist()]
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [plain(value) for value in state]
    return state
