"""Which flow under which cap: all of them, on the same responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from copris_lightning.core.timing.calibration import Measured, calibrate
from copris_lightning.core.timing.costs import Costs
from copris_lightning.core.timing.cycles import Cycle, Cycles, Flow, Sizes
from copris_lightning.core.timing.lengths import Draws, Lengths

SYNC = Flow(max_staleness=0)


def flows(max_staleness: int | None) -> dict[str, Flow]:
    """Synchronous RL and the flows of a run, by name.

    Args:
        max_staleness: bound of all but the first; ``None``: no bound, and none that streams, which
            a run refuses without one.
    """
    found = {"sync": SYNC}
    for streams in (False, True) if max_staleness is not None else (False,):
        for keeps in (False, True):
            name = f"{'streaming' if streams else 'staged'} {'kept' if keeps else 'fresh'}"
            found[name] = Flow(streams, keeps, max_staleness)
    return found


@dataclass(frozen=True)
class Row:
    """What a flow takes under a cap and a limit.

    Attributes:
        limit: on a response, in tokens.
        cap: trajectories in flight at most.
        flow: its name.
        gain: how many times faster than the fastest sync under this limit, whatever its cap.
        cycle: its mean cycle.
    """

    limit: int
    cap: int
    flow: str
    gain: float
    cycle: Cycle


class Comparison:
    """What is compared: caps, limits and flows; what they have in common is given here.

    Args:
        lengths: of responses.
        sizes: of batches, groups and responses; the limit is each call's.
        costs: of the work.
        batches: to take means over.
        warm_up: batches before these.
        seed: of what is drawn.

    Attributes:
        costs: as given, or with what :meth:`calibrate` found.
    """

    def __init__(
        self,
        lengths: Lengths,
        sizes: Sizes,
        costs: Costs,
        *,
        batches: int = 20,
        warm_up: int = 10,
        seed: int = 0,
    ) -> None:
        self.costs = costs
        self._sizes = sizes
        self._draws = Draws(lengths, sizes.group_size, seed)
        self._batches, self._warm_up = batches, warm_up

    def cycle(self, flow: Flow, cap: int, limit: int) -> Cycle:
        """The mean cycle of a flow."""
        sizes = replace(self._sizes, limit=limit)
        run = Cycles(self._draws, sizes, self.costs, flow, cap)
        return run.mean(self._batches, self._warm_up)

    def calibrate(self, gains: Mapping[int, float], cap: int, max_staleness: int | None) -> None:
        """Find the costs under which the staged flow with fresh keys and values has these gains.

        Args:
            gains: over sync, by limits; two.
            cap: under which they were measured.
            max_staleness: the same.

        Raises:
            ConfigurationError: :func:`calibrate`.
        """
        staged = flows(max_staleness)["staged fresh"]
        points = [
            Measured(gain, self.cycle(SYNC, cap, at).work, self.cycle(staged, cap, at).work)
            for at, gain in gains.items()
        ]
        self.costs = calibrate(points, self.costs)

    def rows(self, limit: int, caps: Sequence[int], max_staleness: int | None) -> list[Row]:
        """Every flow under every cap, cap by cap."""
        batch = self._sizes.groups * self._sizes.group_size
        synced: dict[int, Cycle] = {}
        cycles: dict[tuple[int, str], Cycle] = {}
        for cap in caps:
            for name, flow in flows(max_staleness).items():
                if name != "sync":
                    cycles[cap, name] = self.cycle(flow, cap, limit)
                    continue
                used = min(cap, batch)  # more is never in flight
                if used not in synced:
                    synced[used] = self.cycle(flow, used, limit)
                cycles[cap, name] = synced[used]
        fastest = min(cycle.seconds for cycle in synced.values())
        return [
            Row(limit, cap, name, fastest / cycle.seconds if cycle.seconds else 1.0, cycle)
            for (cap, name), cycle in cycles.items()
        ]


def best(rows: Sequence[Row]) -> dict[str, Row]:
    """The fastest row of each flow; of equals that with the smallest cap."""
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.cap):
        if row.flow not in found or row.cycle.seconds < found[row.flow].cycle.seconds:
            found[row.flow] = row
    return found
