"""What is logged of a batch before it is trained on, by the names of docs and loggers."""

from __future__ import annotations

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
        "rollout/cap": stats.cap_mean,
        "rollout/occupancy": stats.in_flight_mean / stats.cap_mean,
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
