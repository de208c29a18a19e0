"""The values that flow through a rollout: segments, trajectories and prompt groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length"]
LogprobSource = Literal["trainer", "engine"]
TRUNCATED = "truncated"
"""Why a trajectory is excluded that hit the limit, where such are not trained on."""


@dataclass(slots=True)
class Segment:
    """A run of consecutive response tokens made under one policy version.

    Attributes:
        version: the policy version that produced every token of the segment.
        token_ids: the tokens, in order.
        logprobs: natural-log probabilities of the distribution that the engine sampled
            from, one per token; none if nobody asked for them (an evaluation).
        trainer_logprobs: the same quantity recomputed by the trainer under the weights of
            ``version``; covers a prefix of the tokens, all of them once scored.
    """

    version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    trainer_logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class Trajectory:
    """One sample of one prompt: append-only until it is finished.

    Attributes:
        group_id: the group (one prompt) that it belongs to.
        sample: index within the group, ``0 <= sample < G``.
        prompt_id: the user's name for the prompt.
        prompt_token_ids: the prompt as sent to the engine.
        max_new_tokens: limit on the response length over all resumes, in tokens.
        segments: the response so far, versions non-decreasing.
        finish_reason: ``"stop"`` (a stop token) or ``"length"`` (the limit); ``None`` before.
        reward: set once scored; NaN if the reward gave no number.
        advantage: set once its group is delivered to training.
        proximal_logprobs: of every response token under the version being trained; empty unless
            the estimator asks for them.
        excluded: why it is left out of the loss: ``"truncated"``, or what was not finite
            (it is quarantined then); ``None`` if it is trained on.
    """

    group_id: int
    sample: int
    prompt_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    segments: list[Segment] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    reward: float | None = None
    advantage: float | None = None
    proximal_logprobs: list[float] = field(default_factory=list)
    excluded: str | None = None

    @property
    def is_quarantined(self) -> bool:
        """Whether something about it is not finite, so that nothing of it may be used."""
        return self.excluded not in (None, TRUNCATED)

    @property
    def response_length(self) -> int:
        """Response tokens so far, over all segments."""
        return sum(len(segment) for segment in self.segments)

    @property
    def remaining_tokens(self) -> int:
        """Response tokens that may still be generated."""
        return self.max_new_tokens - self.response_length

    @property
    def response_token_ids(self) -> list[int]:
        """The response so far, segments concatenated."""
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def versions(self) -> list[int]:
        """The policy version of each response token."""
        return [segment.version for segment in self.segments for _ in range(len(segment))]

    @property
    def is_mixed(self) -> bool:
        """Whether more than one policy version wrote the response."""
        return len(self.segments) > 1

    def append(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, version: int
    ) -> None:
        """Append a chunk of response tokens made under ``version``; an empty chunk is a no-op.

        Args:
            token_ids: the tokens, in order.
            logprobs: one per token; ``None`` where nobody asked for any, in which case no chunk
                of the trajectory has them.
            version: the policy version that made them.

        Raises:
            ValueError: unequal numbers of tokens and log-probs, a version older than the last
                segment's, more tokens than the limit allows, or a finished trajectory.
        """
        if logprobs is not None and len(token_ids) != len(logprobs):
            raise ValueError(
                f"{self.name}: {len(token_ids)} tokens came with {len(logprobs)} log-probs"
            )
        if not token_ids:
            return
        if self.segments and (logprobs is None) != (not self.segments[-1].logprobs):
            raise ValueError(f"{self.name}: log-probs came with some of its chunks only")
        if self.finish_reason is not None:
            raise ValueError(f"{self.name} is finished ({self.finish_reason}); cannot append")
        if len(token_ids) > self.remaining_tokens:
            raise ValueError(
                f"{self.name}: {self.response_length} + {len(token_ids)} tokens exceed the "
                f"limit of {self.max_new_tokens}"
            )
        if self.segments and version < self.segments[-1].version:
            raise ValueError(
                f"{self.name}: version {version} follows version {self.segments[-1].version}"
            )
        if not self.segments or self.segments[-1].version != version:
            self.segments.append(Segment(version))
        self.segments[-1].token_ids.extend(token_ids)
        self.segments[-1].logprobs.extend(logprobs or ())

    def unscored_tokens(self) -> int:
        """Response tokens whose log-probs the trainer has not recomputed yet."""
        return sum(len(s) - len(s.trainer_logprobs) for s in self.segments)

    def set_trainer_logprobs(self, logprobs: Sequence[float]) -> None:
        """Store the trainer's log-probs of all tokens not scored yet (the response's tail).

        Args:
            logprobs: one value per response token ``[response_length]``; those of tokens that
                are scored already are ignored, since the weights that made them are gone.

        Raises:
            ValueError: the number of values is not the response length.
        """
        if len(logprobs) != self.response_length:
            raise ValueError(
                f"{self.name}: {len(logprobs)} log-probs for {self.response_length} tokens"
            )
        start = 0
        for segment in self.segments:
            scored = len(segment.trainer_logprobs)
            segment.trainer_logprobs.extend(logprobs[start + scored : start + len(segment)])
            start += len(segment)

    def behavior_logprobs(self, source: LogprobSource) -> list[float]:
        """The segments' log-probs concatenated: the denominator of the importance ratio.

        Args:
            source: ``"engine"`` for those it sampled with, ``"trainer"`` for the recomputed.

        Raises:
            ValueError: some tokens have no log-prob of that source.
        """
        if source == "engine":
            values = [value for segment in self.segments for value in segment.logprobs]
            if len(values) != self.response_length:
                raise ValueError(f"{self.name}: the engine was not asked for log-probs")
            return values
        if self.unscored_tokens():
            raise ValueError(f"{self.name}: {self.unscored_tokens()} tokens are not scored")
        return [value for segment in self.segments for value in segment.trainer_logprobs]

    def not_finite(self) -> str | None:
        """What of the trajectory is not a finite number, in words; ``None`` if all is."""
        if self.reward is not None and not math.isfinite(self.reward):
            return f"its reward is {self.reward}"
        for name, values in (
            ("the engine's", [v for s in self.segments for v in s.logprobs]),
            ("the trainer's", [v for s in self.segments for v in s.trainer_logprobs]),
            ("the proximal policy's", self.proximal_logprobs),
        ):
            for position, value in enumerate(values):
                if not math.isfinite(value):
                    return f"{name} log-prob of token {position} is {value}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; the inverse of :meth:`from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trajectory:
        """Rebuild a trajectory from :meth:`state_dict`."""
        segments = [
            Segment(
                s["version"], *(list(s[k]) for k in ("token_ids", "logprobs", "trainer_logprobs"))
            )
            for s in state["segments"]
        ]
        prompt = tuple(state["prompt_token_ids"])
        return cls(**{**state, "segments": segments, "prompt_token_ids": prompt})

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"trajectory {self.sample} of prompt {self.prompt_id!r} (group {self.group_id})"


@dataclass(slots=True)
class PromptGroup:
    """The ``G`` trajectories of one prompt; advantages are relative to the group.

    Attributes:
        group_id: serial number of admission; smaller is older.
        prompt_index: where the prompt source finds the prompt again.
        trajectories: all ``G``, in sample order.
        first_version: policy version under which its first trajectory was started, ``None``
            while none was. No token of the group is older.
    """

    group_id: int
    prompt_index: int
    trajectories: list[Trajectory]
    first_version: int | None = None

    @property
    def rewards(self) -> list[float]:
        """The rewards ``[G]`` of a scored group.

        Raises:
            ValueError: some trajectory has no reward yet.
        """
        rewards = [t.reward for t in self.trajectories if t.reward is not None]
        if len(rewards) != len(self.trajectories):
            raise ValueError(f"group {self.group_id} is not scored yet")
        return rewards

    def state_dict(self) -> dict[str, Any]:
        """Plain values only; the inverse of :meth:`from_state`."""
        return {
            "group_id": self.group_id,
            "prompt_index": self.prompt_index,
            "first_version": self.first_version,
            "trajectories": [t.state_dict() for t in self.trajectories],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> PromptGroup:
        """Rebuild a group from :meth:`state_dict`."""
        trajectories = [Trajectory.from_state(t) for t in state["trajectories"]]
        return cls(**{**state, "trajectories": trajectories})
