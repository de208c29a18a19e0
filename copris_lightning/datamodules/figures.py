"""What is logged of a batch before it is trained on, by the names of docs and loggers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from copris_lightning.core.trajectory import Trajectory
from copris_lightning.datamodules.credit import mean_reward
from copris_lightning.rollout.figures import StageStats


def stage_figures(stats: StageStats) -> dict[str, float]:
    """Of the stage that the batch was taken in."""
    return {
        "rollout/stage_s": stats.seconds,
        "rollout/tokens_per_s": stats.tokens / max(stats.seconds, 1e-9),
        "rollout/in_flight": stats.in_flight_mean,
        "rollout/carried_over": float(stats.carried_over),
        "rollout/ready_groups": float(stats.ready_groups),
        "rollout/dropped_groups": float(stats.dropped_groups),
        "rollout/resent_tokens": float(stats.resent_tokens),
        "rollout/dropped_tokens": float(stats.dropped_tokens),
    }


def response_figures(rows: Sequence[Trajectory]) -> dict[str, float]:
    """Of the batch's trajectories, credited."""
    tokens = sum(t.response_length for t in rows)
    written = [s for t in rows for s in t.segments if s.version is not None]
    kv_lag = sum(s.length * ((s.version or 0) - (s.kv_version or 0)) for s in written)
    return {
        "staleness/kv_lag_mean": kv_lag / max(1, sum(s.length for s in written)),
        "train/reward": mean_reward(rows),
        "train/response_tokens": tokens / len(rows),
        "train/truncated_fraction": sum(t.finish_reason == "length" for t in rows) / len(rows),
        "train/excluded_fraction": sum(t.excluded is not None for t in rows) / len(rows),
        "train/quarantined": float(sum(t.is_quarantined for t in rows)),
    }


class Cycle:
    """Measures from one rollout's end to the next one's: training, sync, rollout."""

    def __init__(self) -> None:
        self._last: float | None = None
        self._begun = self._ended = 0.0

    def begin(self) -> None:
        """A rollout begins."""
        self._begun = time.perf_counter()

    def rolled_out(self) -> None:
        """It has ended."""
        self._ended = time.perf_counter()

    def figures(self, tokens: int) -> dict[str, float]:
        """Of the cycle that has ended, during which so many response tokens were trained on;
        none for the first."""
        last, self._last = self._last, self._ended
        if last is None:
            return {}
        cycle = self._ended - last
        return {
            "time/cycle_s": cycle,
            "time/rollout_fraction": (self._ended - self._begun) / cycle,
            "train/tokens_per_s": tokens / cycle,
        }
