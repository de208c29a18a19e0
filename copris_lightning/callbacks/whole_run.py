"""Where the time of a run went, and what binds: lines for its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, takewhile

from copris_lightning.datamodules.cycle import ACTIVITIES, Activity

History = Mapping[str, Sequence[float]]
"""Logged figures by name, one a batch."""

_BINDS = 0.5
"""What takes less than this share of the time does not bind alone: all of the others together could
gain more."""

_FULL = 0.9
"""An engine that is this full on average has no place left to fill."""

_REASONS: dict[Activity, str] = {
    "rollout": "training waits for a batch {share:.0%} of the time; see flow.cap, or the engine",
    "score": "{share:.0%} of the time goes to log-probs before training; see "
    "flow.behavior_logprobs and batch.score_tokens",
    "train": "{share:.0%} of the time; see trainer.devices and trainer.accumulate_grad_batches",
    "sync": "{share:.0%} of the time; see engine.transport and WeightSync.parity_sequences",
    "idle": "{share:.0%} of the time goes to nothing else; see trainer.callbacks, and the ranks' "
    "shares",
}
_UNFILLED = (
    "training waits for a batch {share:.0%} of the time, and places in flight stay empty; see "
    "flow.max_staleness"
)


def trained_tokens_per_s(history: History) -> float:
    """Over all cycles together; their mean would favour the short ones."""
    return _mean(history["train/tokens_per_s"], history["time/cycle_s"])


def time_lines(history: History) -> list[tuple[str, str]]:
    """Labels and texts; none before the first cycle has ended."""
    cycles = history.get("time/cycle_s")
    if not cycles:
        return []
    shares = {a: _mean(history[f"time/{a}_fraction"], cycles) for a in ACTIVITIES}
    parts = ", ".join(f"{activity} {share:.1%}" for activity, share in shares.items())
    lines = [("time", f"{parts} of {sum(cycles):,.1f} s")]
    by_rank = (history.get(f"time/idle_fraction/rank_{rank}") for rank in count())
    idle = [f"{_mean(values, cycles):.1%}" for values in takewhile(bool, by_rank) if values]
    if idle:
        lines.append(("idle by rank", ", ".join(idle)))
    occupancy = 1.0
    if history.get("rollout/occupancy"):
        occupancy = _mean(history["rollout/occupancy"], history["rollout/stage_s"])
        lines.append(("engine", f"{occupancy:.1%} of the cap in flight while generating"))
    if history.get("train/mfu"):
        busy = [
            (score + train) * cycle
            for score, train, cycle in zip(
                history["time/score_fraction"], history["time/train_fraction"], cycles, strict=True
            )
        ]
        used = _mean(history["train/mfu"], busy)
        lines.append(("trainer", f"{used:.1%} of the bf16 peak while it scores and trains"))
    lines.append(("what binds", what_binds(shares, occupancy)))
    return lines


def what_binds(shares: Mapping[Activity, float], occupancy: float) -> str:
    """The activity that takes at least half of the time, and the settings to look at.

    Args:
        shares: of the whole time, by activity.
        occupancy: trajectories in flight while the engine generates, as a share of the cap.
    """
    first, second = sorted(shares, key=shares.__getitem__, reverse=True)[:2]
    share = shares[first]
    if share < _BINDS:
        return f"nothing alone: {first} {share:.0%}, {second} {shares[second]:.0%}"
    reason = _UNFILLED if first == "rollout" and occupancy < _FULL else _REASONS[first]
    return f"{first}: {reason.format(share=share)}"


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    weighted = sum(v * w for v, w in zip(values, weights, strict=True))
    return weighted / max(sum(weights), 1e-9)
