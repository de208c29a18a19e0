"""The record of what was generated: trajectories in columns, and the groups they belong to."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from copris_lightning.core.columns import WHOSE, Source, not_finite
from copris_lightning.core.outcome import Credit, Excluded, FinishReason, Outcome, Verdict
from copris_lightning.core.segments import Segment, Span, between, label, last_version

LogprobSource = Literal["trainer", "engine"]
"""Whose log-probs may be the behaviour's."""


@dataclass(slots=True)
class Trajectory:
    """One sample of one prompt: append-only until it is finished.

    Attributes:
        group_id: the group (one prompt) that it belongs to.
        sample: index within the group, ``0 <= sample < G``.
        prompt_id: the user's name for the prompt.
        prompt: its tokens as sent to the engine.
        max_new_tokens: limit on the response length over all resumes, in tokens.
        tokens: the response so far, int32.
        segments: the labels of the tokens, in order; neighbours differ, versions never fall.
        logprobs: by source, natural log under the sampled distribution, float32, one per token;
            only the trainer's may cover a prefix, until it scores the rest. A source that nobody
            asked for is absent. An observation's are placeholders.
        outcome: ``None`` before it is finished.
        credit: ``None`` before its group is trained on.
    """

    group_id: int
    sample: int
    prompt_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    segments: list[Segment] = field(default_factory=list)
    logprobs: dict[Source, array[float]] = field(default_factory=dict)
    outcome: Outcome | None = None
    credit: Credit | None = None

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return f"trajectory {self.sample} of prompt {self.prompt_id!r} (group {self.group_id})"

    @property
    def sequence(self) -> array[int]:
        """Prompt and response, a copy."""
        return array("i", self.prompt) + self.tokens

    @property
    def response_length(self) -> int:
        """Response tokens so far, observations included."""
        return len(self.tokens)

    @property
    def written_tokens(self) -> int:
        """Response tokens that a policy wrote."""
        return sum(segment.length for segment in self._written)

    @property
    def remaining_tokens(self) -> int:
        """By how many tokens the response may still grow."""
        return self.max_new_tokens - len(self.tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """``None`` before it is finished."""
        return None if self.outcome is None else self.outcome.finish_reason

    @property
    def verdict(self) -> Verdict | None:
        """``None`` before it is scored."""
        return None if self.outcome is None else self.outcome.verdict

    @property
    def reward(self) -> float | None:
        """``None`` before it is scored, and where scoring it failed."""
        return None if self.verdict is None else self.verdict.reward

    @property
    def excluded(self) -> Excluded | None:
        """Why it is left out of the loss; ``None`` if it is not."""
        return None if self.credit is None else self.credit.excluded

    @property
    def is_quarantined(self) -> bool:
        """Whether something about it is not finite, so that nothing of it may be used."""
        return self.excluded is not None and self.excluded.is_quarantined

    # -- generation ------------------------------------------------------------------------

    def append(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        version: int,
        kv_version: int | None = None,
    ) -> None:
        """Append a chunk of response tokens made under ``version``; an empty chunk is a no-op.

        Args:
            token_ids: the tokens, in order.
            logprobs: the engine's, one per token; ``None`` where nobody asked for any, in which
                case no chunk of the trajectory has them.
            version: the policy version that made them, or a lower bound on it that
                :meth:`relabel` may raise.
            kv_version: of the keys and values they attended to; ``None`` for ``version``.

        Raises:
            ValueError: unequal numbers of tokens and log-probs, a version older than the last
                segment's or than its keys and values, more tokens than the limit allows, or a
                finished trajectory.
        """
        if logprobs is not None and len(token_ids) != len(logprobs):
            raise ValueError(
                f"{self.name}: {len(token_ids)} tokens came with {len(logprobs)} log-probs"
            )
        if not len(token_ids):
            return
        self._check_room(len(token_ids))
        if any(self._written) and (logprobs is None) == ("engine" in self.logprobs):
            raise ValueError(f"{self.name}: log-probs came with some of its chunks only")
        kv_version = version if kv_version is None else kv_version
        self._check_label(version, kv_version, after=last_version(self.segments))
        if logprobs is not None:
            if "engine" not in self.logprobs:
                self.logprobs["engine"] = array("f", bytes(4 * len(self.tokens)))
            self.logprobs["engine"].extend(array("f", logprobs))
        self.tokens.extend(array("i", token_ids))
        label(self.segments, Segment(len(token_ids), version, kv_version))

    def observe(self, token_ids: Sequence[int]) -> None:
        """Append tokens that no policy wrote (what a tool or an environment answered).

        They are read by the policy and count towards the limit, but no loss sees them.

        Raises:
            ValueError: more tokens than the limit allows, or a finished trajectory.
        """
        if not len(token_ids):
            return
        self._check_room(len(token_ids))
        if "engine" in self.logprobs:
            self.logprobs["engine"].extend(array("f", bytes(4 * len(token_ids))))
        self.tokens.extend(array("i", token_ids))
        label(self.segments, Segment(len(token_ids), None, None))

    def relabel(self, start: int, spans: Sequence[Span]) -> None:
        """Replace the labels of the tokens from ``start`` on by the engine's own word on them.

        Versions given before are lower bounds: they may only be raised. (A lower bound of the
        keys' and values' is not known before, so theirs are taken as they are told.)

        Args:
            start: how many response tokens there were when the engine's stream began.
            spans: over all tokens since, oldest first.

        Raises:
            ValueError: the spans do not cover exactly these tokens, fall, lower a version, or
                label an observation. Nothing is changed.
        """
        told = sum(span.length for span in spans)
        if start < 0 or start + told != len(self.tokens) or any(s.length < 1 for s in spans):
            raise ValueError(
                f"{self.name}: labels of {told} tokens from token {start} on, of "
                f"{len(self.tokens)} tokens"
            )
        segments = between(self.segments, 0, start)
        for span in spans:
            self._check_label(span.version, span.kv_version, after=last_version(segments))
            for old in between(self.segments, start, start + span.length):
                if old.version is None:
                    raise ValueError(f"{self.name}: an observation is labelled {span.version}")
                if span.version < old.version:
                    raise ValueError(
                        f"{self.name}: a token of version {old.version} is labelled {span.version}"
                    )
            label(segments, Segment(span.length, span.version, span.kv_version))
            start += span.length
        self.segments = segments

    def finish(self, reason: FinishReason) -> None:
        """The response is complete."""
        self.outcome = Outcome(reason)

    def judge(self, verdict: Verdict) -> None:
        """The finished response is scored.

        Raises:
            ValueError: it is not finished.
        """
        if self.outcome is None:
            raise ValueError(f"{self.name} is scored before it is finished")
        self.outcome = replace(self.outcome, verdict=verdict)

    # -- log-probs -------------------------------------------------------------------------

    def missing(self, source: Source) -> int:
        """How many tokens have no log-prob from ``source``."""
        return len(self.tokens) - len(self.logprobs.get(source, ()))

    def column(self, source: Source) -> array[float]:
        """The log-probs of ``source``, one per token.

        Raises:
            ValueError: some token has none.
        """
        if self.missing(source):
            raise ValueError(
                f"{self.name}: {self.missing(source)} of {len(self.tokens)} tokens have none of "
                f"{WHOSE[source]} log-probs"
            )
        return self.logprobs.get(source, array("f"))

    def add_logprobs(self, source: Source, logprobs: Sequence[float]) -> None:
        """Store log-probs of all tokens that have none from ``source`` yet (the response's tail).

        Args:
            source: who computed them.
            logprobs: one value per response token; those of tokens that have one already are
                ignored, since the weights that made them are gone.

        Raises:
            ValueError: the number of values is not the response length.
        """
        if len(logprobs) != len(self.tokens):
            raise ValueError(
                f"{self.name}: {len(logprobs)} log-probs for {len(self.tokens)} tokens"
            )
        column = self.logprobs.setdefault(source, array("f"))
        column.extend(array("f", logprobs[len(column) :]))

    def fault(self) -> str | None:
        """Why nothing of it may be used, in words: it has no reward, or a log-prob that is not a
        finite number. ``None`` if all is well."""
        if self.verdict is not None and self.verdict.fault is not None:
            return self.verdict.fault
        for source, whose in WHOSE.items():
            column = self.logprobs.get(source, array("f"))
            position = not_finite(column)
            if position is not None:
                return f"{whose} log-prob of token {position} is {column[position]}"
        return None

    @property
    def _written(self) -> Iterator[Segment]:
        return (segment for segment in self.segments if segment.version is not None)

    def _check_room(self, count: int) -> None:
        if self.outcome is not None:
            raise ValueError(f"{self.name} is finished ({self.finish_reason}); cannot append")
        if count > self.remaining_tokens:
            raise ValueError(
                f"{self.name}: {self.response_length} + {count} tokens exceed the "
                f"limit of {self.max_new_tokens}"
            )

    def _check_label(self, version: int, kv_version: int, *, after: int | None) -> None:
        if after is not None and version < after:
            raise ValueError(f"{self.name}: version {version} follows version {after}")
        if kv_version > version:
            raise ValueError(
                f"{self.name}: tokens of version {version} attended to keys and values of "
                f"version {kv_version}"
            )


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
    def verdicts(self) -> list[Verdict]:
        """The verdicts ``[G]`` of a scored group.

        Raises:
            ValueError: some trajectory has none yet.
        """
        verdicts = [t.verdict for t in self.trajectories if t.verdict is not None]
        if len(verdicts) != len(self.trajectories):
            raise ValueError(f"group {self.group_id} is not scored yet")
        return verdicts
