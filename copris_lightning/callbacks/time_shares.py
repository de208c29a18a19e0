"""What the time of a cycle went to, over all ranks, and how well devices were used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from copris_lightning.datamodules.cycle import ACTIVITIES, Activity, Lap
from copris_lightning.policy.flops import ModelCost, Work, device_peak


class Laps(Metric):
    """The ranks' seconds side by side, and the work of all of them."""

    full_state_update = False
    seconds: Tensor
    scored: Tensor
    trained: Tensor

    def __init__(self) -> None:
        super().__init__()
        nothing = torch.zeros(len(ACTIVITIES), dtype=torch.float64)
        self.add_state("seconds", nothing, dist_reduce_fx=None)
        for name in ("scored", "trained"):
            self.add_state(name, torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, lap: Lap) -> None:
        """Add this rank's."""
        self.seconds += self.seconds.new_tensor([lap.seconds[a] for a in ACTIVITIES])
        self.scored += self.scored.new_tensor(astuple(lap.scored))
        self.trained += self.trained.new_tensor(astuple(lap.trained))

    def compute(self) -> tuple[list[dict[Activity, float]], Work, Work]:
        """Seconds by rank; what was scored; what was trained on."""
        rows = self.seconds.reshape(-1, len(ACTIVITIES)).tolist()
        seconds = [dict(zip(ACTIVITIES, row, strict=True)) for row in rows]
        return seconds, Work(*self.scored.tolist()), Work(*self.trained.tolist())


class TimeShares:
    """Makes the figures of a cycle; every rank has one, and asks equally often.

    Args:
        peak: a device's best in FLOP/s; ``None`` where that is not known.
    """

    def __init__(self, peak: Callable[[torch.device], float | None] = device_peak) -> None:
        self._peak = peak
        self._laps = Laps()
        self._best: tuple[ModelCost, float] | None = None
        self._is_known = False

    def figures(self, lap: Lap, module: Any) -> dict[str, float]:
        """To log of a cycle; the same on all ranks.

        Args:
            lap: this rank's.
            module: the :class:`~copris_lightning.policy.module.CoprisModule` that is trained.
        """
        self._laps.to(module.device)
        self._laps.reset()
        self._laps.update(lap)
        ranks, scored, trained = self._laps.compute()
        figures = time_figures(ranks, trained.responses)
        if not self._is_known:
            self._best, self._is_known = self._find_best(module), True
        if self._best is not None:
            cost, peak = self._best
            needed = cost.forward(scored) + cost.training(trained)
            figures["train/mfu"] = utilization(needed, ranks, peak)
        return figures

    def _find_best(self, module: Any) -> tuple[ModelCost, float] | None:
        """The model's cost and its device's peak, where both are known."""
        peak = self._peak(module.device)
        cost = ModelCost.of(module) if peak is not None else None
        return None if cost is None or peak is None else (cost, peak)


def time_figures(ranks: list[dict[Activity, float]], tokens: int) -> dict[str, float]:
    """Of a cycle: shares of the time, over all ranks and (of several) of each.

    Args:
        ranks: seconds of each.
        tokens: response tokens that all of them trained on.
    """
    whole = sum(sum(seconds.values()) for seconds in ranks)
    cycle = whole / len(ranks)
    figures = {"time/cycle_s": cycle, "train/tokens_per_s": tokens / max(cycle, 1e-9)}
    for activity in ACTIVITIES:
        name = f"time/{activity}_fraction"
        figures[name] = sum(seconds[activity] for seconds in ranks) / max(whole, 1e-9)
        if len(ranks) > 1:
            for rank, seconds in enumerate(ranks):
                own = max(sum(seconds.values()), 1e-9)
                figures[f"{name}/rank_{rank}"] = seconds[activity] / own
    return figures


def utilization(needed: float, ranks: list[dict[Activity, float]], peak: float) -> float:
    """Model FLOPs utilization of the trainer's devices, while they score and train.

    Args:
        needed: FLOPs of the model's passes, over all ranks.
        ranks: seconds of each.
        peak: FLOP/s of one device.
    """
    busy = sum(seconds["score"] + seconds["train"] for seconds in ranks)
    return needed / max(busy * peak, 1.0)
