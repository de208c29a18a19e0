"""Groups as a checkpoint holds them: a tensor per column, over all of their trajectories.

However many trajectories there are, a file has the same few tensors. Saving copies each column
once; besides that it and loading do a few steps per trajectory, and none per token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, islice
from typing import Any

from torch import Tensor

from copris_lightning.core.columns import WHOSE, Rows, Source, joined, split, tensor_of
from copris_lightning.core.outcome import Credit, Excluded, FinishReason, Outcome, Verdict
from copris_lightning.core.segments import Segment
from copris_lightning.core.trajectory import PromptGroup, Trajectory

_ENDINGS: dict[FinishReason | None, int] = {None: 0, "stop": 1, "length": 2}

Sparse = tuple[Tensor, Tensor]
"""What some trajectories have: their places among all, int64, and the values, float64."""


@dataclass(frozen=True, slots=True, eq=False)
class SavedGroups:
    """N groups with T trajectories between them, at one moment; it shares nothing with them.

    Attributes:
        group_ids: ``[N]`` int64, as all whole numbers here.
        prompt_indices: ``[N]``.
        first_versions: ``[N]``; -1 for a group of which nothing was started.
        sizes: trajectories of each group ``[N]``.
        limits: the longest that a response may become, in tokens ``[N]``.
        prompt_ids: N names.
        prompts: N rows of tokens.
        samples: ``[T]``, group by group.
        tokens: T rows of response tokens.
        segments: T rows of three numbers a segment: length, version, KV version; -1 for ``None``.
        logprobs: by source, T rows.
        endings: ``[T]``; 0 for a trajectory that is not finished, 1 for ``"stop"``, 2 for
            ``"length"``.
        rewards: of those that have one.
        parts: by name, of the rewards that have such a part.
        faults: place and words, of those whose verdict is one.
        credits: place, advantage, and why it is left out: words and whether it is quarantined.
    """

    group_ids: Tensor
    prompt_indices: Tensor
    first_versions: Tensor
    sizes: Tensor
    limits: Tensor
    prompt_ids: list[str]
    prompts: Rows
    samples: Tensor
    tokens: Rows
    segments: Rows
    logprobs: dict[Source, Rows]
    endings: Tensor
    rewards: Sparse
    parts: dict[str, Sparse]
    faults: list[tuple[int, str]]
    credits: list[tuple[int, float, str | None, bool]]

    @classmethod
    def of(cls, groups: Iterable[PromptGroup]) -> SavedGroups:
        """A copy of groups, each of whose trajectories are of one prompt."""
        held = list(groups)
        rows = [trajectory for group in held for trajectory in group.trajectories]
        firsts = [group.trajectories[0] for group in held]
        verdicts = [(i, t.verdict) for i, t in enumerate(rows) if t.verdict is not None]
        credited = [(i, t.credit) for i, t in enumerate(rows) if t.credit is not None]
        return cls(
            group_ids=_whole(group.group_id for group in held),
            prompt_indices=_whole(group.prompt_index for group in held),
            first_versions=_whole(_number(group.first_version) for group in held),
            sizes=_whole(len(group.trajectories) for group in held),
            limits=_whole(first.max_new_tokens for first in firsts),
            prompt_ids=[first.prompt_id for first in firsts],
            prompts=joined("i", [array("i", first.prompt) for first in firsts]),
            samples=_whole(row.sample for row in rows),
            tokens=joined("i", [row.tokens for row in rows]),
            segments=(_labels(rows), _whole(3 * len(row.segments) for row in rows)),
            logprobs={
                source: joined("f", [row.logprobs.get(source) for row in rows])
                for source in WHOSE
                if any(source in row.logprobs for row in rows)
            },
            endings=_whole(_ENDINGS[row.finish_reason] for row in rows),
            rewards=_sparse((i, v.reward) for i, v in verdicts if v.reward is not None),
            parts={
                name: _sparse((i, v.parts[name]) for i, v in verdicts if name in v.parts)
                for name in dict.fromkeys(chain.from_iterable(v.parts for _, v in verdicts))
            },
            faults=[(i, v.fault) for i, v in verdicts if v.fault is not None],
            credits=[(i, c.advantage, *_exclusion(c.excluded)) for i, c in credited],
        )

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SavedGroups:
        """What :meth:`state_dict` gave."""
        return cls(**state)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: its own, not copies."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    # -- looking ---------------------------------------------------------------------------

    @property
    def response_tokens(self) -> int:
        """Response tokens of all trajectories."""
        return len(self.tokens[0])

    @property
    def begun(self) -> int:
        """Trajectories that have response tokens."""
        return int((self.tokens[1] > 0).sum())

    @property
    def scored(self) -> int:
        """Trajectories that have a verdict."""
        return len(self.rewards[0]) + len(self.faults)

    def lacking(self, source: Source) -> int:
        """Trajectories of which some token has no log-prob from ``source``."""
        if source not in self.logprobs:
            return self.begun
        return int((self.logprobs[source][1].clamp(min=0) < self.tokens[1]).sum())

    # -- loading ---------------------------------------------------------------------------

    def groups(self) -> list[PromptGroup]:
        """The groups, which share nothing with it."""
        rows = self._rows()
        of_groups = zip(
            self.group_ids.tolist(),
            self.prompt_indices.tolist(),
            self.first_versions.tolist(),
            self.sizes.tolist(),
            self.limits.tolist(),
            self.prompt_ids,
            split(self.prompts),
            strict=True,
        )
        made = []
        for group_id, index, first, size, limit, prompt_id, tokens in of_groups:
            prompt = tuple(tokens)
            trajectories = [
                Trajectory(group_id, sample, prompt_id, prompt, limit, *columns)
                for sample, *columns in islice(rows, size)
            ]
            made.append(PromptGroup(group_id, index, trajectories, _version(first)))
        return made

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """Of each trajectory what its group does not tell, in the order of its fields."""
        logprobs = [(source, split(column)) for source, column in self.logprobs.items()]
        columns = zip(
            self.samples.tolist(),
            split(self.tokens),
            split(self.segments),
            self._outcomes(),
            self._credits(),
            strict=True,
        )
        for sample, tokens, labels, outcome, credit in columns:
            named = ((source, next(column)) for source, column in logprobs)
            of_sources = {source: row for source, row in named if row is not None}
            yield sample, tokens, _segments(labels), of_sources, outcome, credit

    def _outcomes(self) -> Iterator[Outcome | None]:
        parts: dict[int, dict[str, float]] = {}
        for name, column in self.parts.items():
            for place, value in _pairs(column):
                parts.setdefault(place, {})[name] = value
        verdicts = {i: Verdict(reward, parts.get(i, {})) for i, reward in _pairs(self.rewards)}
        verdicts |= {i: Verdict(None, parts.get(i, {}), fault) for i, fault in self.faults}
        reasons = list(_ENDINGS)
        for place, ending in enumerate(self.endings.tolist()):
            reason = reasons[ending]
            yield None if reason is None else Outcome(reason, verdicts.get(place))

    def _credits(self) -> Iterator[Credit | None]:
        found = {
            place: Credit(advantage, None if reason is None else Excluded(reason, is_quarantined))
            for place, advantage, reason, is_quarantined in self.credits
        }
        return (found.get(place) for place in range(len(self.samples)))


def _whole(numbers: Iterable[int]) -> Tensor:
    return tensor_of(array("q", numbers), "q")


def _sparse(pairs: Iterable[tuple[int, float]]) -> Sparse:
    found = list(pairs)
    values = array("d", [value for _, value in found])
    return _whole(place for place, _ in found), tensor_of(values, "d")


def _pairs(column: Sparse) -> Iterable[tuple[int, float]]:
    return zip(column[0].tolist(), column[1].tolist(), strict=True)


def _number(version: int | None) -> int:
    return -1 if version is None else version


def _version(number: int) -> int | None:
    return None if number < 0 else number


def _exclusion(excluded: Excluded | None) -> tuple[str | None, bool]:
    return (None, False) if excluded is None else (excluded.reason, excluded.is_quarantined)


def _labels(rows: Iterable[Trajectory]) -> Tensor:
    segments = (segment for row in rows for segment in row.segments)
    of_each = ((s.length, _number(s.version), _number(s.kv_version)) for s in segments)
    return tensor_of(array("i", chain.from_iterable(of_each)), "i")


def _segments(labels: array[int]) -> list[Segment]:
    of_each = zip(labels[::3], labels[1::3], labels[2::3], strict=True)
    return [Segment(length, _version(v), _version(kv)) for length, v, kv in of_each]
