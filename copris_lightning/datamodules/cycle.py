"""Where a rank's time goes: the one place where it is booked.

A cycle lasts from the end of one batch's sync to the end of the next one's; the first begins with
the first rollout. At every moment of it one activity is booked:

========== ==========================================================================
rollout    this rank waits for a batch. Where generation goes on while the trainer trains
           (streaming) that is only what training did not hide
score      log-probs that the trainer computes before training
train      from a micro-batch's hand-out until the next is asked for, or the sync begins:
           forward and backward pass, optimizer step
sync       new weights to the engine, and the probe of what arrived
idle       all else: dividing the batch, callbacks and checkpoints after the sync, and the
           waits for other ranks within scoring and training
========== ==========================================================================

The clock stands still during validation. What a rank waits within its strategy's own communication
(DDP reduces gradients, FSDP puts weights together) cannot be told from the computing that it
overlaps, and is booked as training or scoring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.policy.flops import Work

Activity = Literal["rollout", "score", "train", "sync", "idle"]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)


class Stopwatch:
    """Books each moment to one activity, so that their shares are of the whole.

    It stands still until it is first switched.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds = _nothing()
        self._running: Activity | None = None
        self._since = 0.0

    def switch(self, activity: Activity | None) -> None:
        """Book from now on to another activity; to none, the watch stands still."""
        now = self._clock()
        if self._running is not None:
            self._seconds[self._running] += now - self._since
        self._running, self._since = activity, now

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Around an activity; idle afterwards."""
        self.switch(activity)
        try:
            yield
        finally:
            self.switch("idle")

    def move(self, seconds: float, source: Activity, target: Activity) -> None:
        """Book to another activity what was measured within one; at most what that one has."""
        self.switch(self._running)
        moved = min(seconds, self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    def read(self) -> Mapping[Activity, float]:
        """Seconds by activity since the last lap."""
        self.switch(self._running)
        return dict(self._seconds)

    def lap(self) -> Mapping[Activity, float]:
        """Seconds by activity since the last lap, and begin the next."""
        seconds = self.read()
        self._seconds = _nothing()
        return seconds


@dataclass(frozen=True)
class Lap:
    """A cycle that has ended.

    Attributes:
        seconds: of this rank, by activity.
        scored: what all ranks scored; on rank 0.
        trained: what all ranks trained on; on rank 0.
    """

    seconds: Mapping[Activity, float]
    scored: Work = field(default_factory=Work)
    trained: Work = field(default_factory=Work)


class Cycle:
    """The running cycle: this rank's time and, on rank 0, the work of all ranks.

    Args:
        clock: in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.watch = Stopwatch(clock)
        self._scored, self._trained = Work(), Work()

    def score(self, rows: Sequence[Trajectory]) -> None:
        """These are scored."""
        for row in rows:
            self._scored.add(len(row.prompt) + row.response_length, row.response_length)

    def train(self, micro_batches: Sequence[MicroBatch]) -> None:
        """These are trained on."""
        for batch in micro_batches:
            lengths = zip(
                batch.names, batch.lengths.tolist(), batch.response_lengths.tolist(), strict=True
            )
            for name, tokens, responses in lengths:
                if name:  # not a placeholder
                    self._trained.add(tokens, responses)

    def end(self) -> Lap:
        """It has ended, and the next one begins."""
        lap = Lap(self.watch.lap(), self._scored, self._trained)
        self._scored, self._trained = Work(), Work()
        return lap


def _nothing() -> dict[Activity, float]:
    return dict.fromkeys(ACTIVITIES, 0.0)
