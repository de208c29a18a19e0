"""Labels of tokens, by runs: which policy version wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Span:
    """A run of consecutive tokens, and the engine's word on what made them.

    Attributes:
        length: in tokens, > 0.
        version: the policy version of the weights that made them.
        kv_version: the oldest weights among those that made the keys and values they attended to.
    """

    length: int
    version: int
    kv_version: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of consecutive response tokens with the same label.

    Attributes:
        length: in tokens, > 0.
        version: the policy version that wrote them; ``None`` for an observation, which no policy
            wrote and no loss sees.
        kv_version: the oldest weights among those that made the keys and values that the tokens
            attended to, at most ``version``; ``None`` for an observation.
    """

    length: int
    version: int | None
    kv_version: int | None


Run = TypeVar("Run", Span, Segment)


def last_version(segments: Sequence[Segment]) -> int | None:
    """Of the last token that a policy wrote."""
    return next((s.version for s in reversed(segments) if s.version is not None), None)


def label(segments: list[Segment], new: Segment) -> None:
    """Add a segment at the end, as part of the last one if its label is the same."""
    if segments and (segments[-1].version, segments[-1].kv_version) == (
        new.version,
        new.kv_version,
    ):
        new = Segment(segments.pop().length + new.length, new.version, new.kv_version)
    segments.append(new)


def between(segments: Sequence[Run], start: int, end: int) -> list[Run]:
    """The labels of the tokens from ``start`` up to ``end``."""
    found: list[Run] = []
    position = 0
    for segment in segments:
        length = min(end, position + segment.length) - max(start, position)
        if length > 0:
            found.append(replace(segment, length=length))
        position += segment.length
    return found
