"""What a stage took and made, and where every token went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from copris_lightning.core.buffer import CarryOverBuffer, Status

Rule = Literal["after_stop_string", "dropped_group"]
"""Why tokens are not trained on: they came after the end of a stop string, in the same chunk; or
their whole group was not accepted."""


@dataclass(frozen=True, slots=True)
class TokenBalance:
    """Where the response tokens are that a scheduler received since it began or was restored.

    Attributes:
        restored: tokens that were in the buffer then.
        generated: tokens received since. What an engine makes between a stop string's end and the
            moment it is told to stop never leaves it, and is not counted.
        delivered: tokens of the groups handed over.
        carried: tokens in the buffer, whatever the state of their trajectories.
        dropped: tokens by the :data:`Rule` that dropped them.
    """

    restored: int = 0
    generated: int = 0
    delivered: int = 0
    carried: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Tokens that are nowhere; 0, or there is a bug."""
        gone = self.delivered + sum(self.dropped.values())
        return self.restored + self.generated - gone - self.carried


@dataclass(frozen=True, slots=True)
class StageStats:
    """Figures of one stage.

    Attributes:
        seconds: from the first request to the hold, on the loop's clock; from take to take where
            generation goes on meanwhile.
        tokens: response tokens received.
        resent_tokens: response tokens sent again as prefix when trajectories resumed.
        carried_over: trajectories begun and left unfinished at the end, in flight or not.
        ready_groups: complete groups left for the next batch.
        dropped_groups: complete groups that were not accepted, since the stage before ended.
        in_flight_mean: time average of trajectories in flight.
        cap_mean: time average of how many there might be.
        dropped_tokens: of ``tokens``, those that came after the end of a stop string.
        balance: of all tokens since the scheduler began.
    """

    seconds: float
    tokens: int
    resent_tokens: int
    carried_over: int
    ready_groups: int
    dropped_groups: int
    in_flight_mean: float
    cap_mean: float
    dropped_tokens: int = 0
    balance: TokenBalance = field(default_factory=TokenBalance)


class Figures:
    """Adds up as events pass; a stage at a time, and all tokens.

    Args:
        buffer: whose tokens are counted.
    """

    def __init__(self, buffer: CarryOverBuffer) -> None:
        self._buffer = buffer
        self._start = self._last = self._end = 0.0
        self._in_flight = 0
        self._area = self._places = 0.0
        self._restored: int | None = None
        self._total: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()

    def begin(self, now: float, in_flight: int) -> None:
        """A stage begins, with so many trajectories in flight."""
        if self._restored is None:  # before the first one the buffer may be loaded
            self._restored = self._held()
        # Groups that were dropped between two stages count for the later one.
        self._before = Counter({**self._total, "groups": self._before["groups"]})
        self._start = self._last = self._end = now
        self._in_flight, self._area, self._places = in_flight, 0.0, 0.0

    def observe(self, now: float, in_flight: int) -> None:
        """So many trajectories are in flight from ``now`` on."""
        self._area += self._in_flight * (now - self._last)
        self._places += self._buffer.limit * (now - self._last)
        self._last, self._in_flight = now, in_flight

    def end(self, now: float) -> None:
        """The batch is ready, and the engine held if it is to be."""
        self.observe(now, self._in_flight)
        self._end = now

    def received(self, tokens: int, after_stop_string: int) -> None:
        """A chunk came, and some of its last tokens were not kept."""
        self._total["tokens"] += tokens
        if after_stop_string:
            self._dropped["after_stop_string"] += after_stop_string

    def resent(self, tokens: int) -> None:
        """A trajectory goes on after ``tokens`` of response."""
        self._total["resent"] += tokens

    def dropped(self, tokens: int) -> None:
        """A complete group of so many response tokens was not accepted."""
        self._total["groups"] += 1
        self._dropped["dropped_group"] += tokens

    def delivered(self, tokens: int) -> StageStats:
        """So many response tokens were handed over: the stage's figures."""
        self._total["delivered"] += tokens
        self._total["after_stop_string"] = self._dropped["after_stop_string"]
        stage, self._before = self._total - self._before, self._total.copy()
        seconds, area, places = self._end - self._start, self._area, self._places
        self._start, self._area, self._places = self._end, 0.0, 0.0  # for those who stream
        return StageStats(
            seconds=seconds,
            tokens=stage["tokens"],
            resent_tokens=stage["resent"],
            carried_over=self._buffer.count(Status.CARRIED_OVER) + self._buffer.in_flight,
            ready_groups=self._buffer.ready_groups,
            dropped_groups=stage["groups"],
            in_flight_mean=area / seconds if seconds > 0 else 0.0,
            cap_mean=places / seconds if seconds > 0 else float(self._buffer.limit),
            dropped_tokens=stage["after_stop_string"],
            balance=self.balance(),
        )

    def balance(self) -> TokenBalance:
        """Where all tokens are now."""
        held = self._held()
        return TokenBalance(
            restored=held if self._restored is None else self._restored,
            generated=self._total["tokens"],
            delivered=self._total["delivered"],
            carried=held,
            dropped={rule: count for rule, count in self._dropped.items() if count},
        )

    def _held(self) -> int:
        return sum(trajectory.response_length for trajectory in self._buffer.trajectories())
