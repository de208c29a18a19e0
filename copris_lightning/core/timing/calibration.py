"""Two costs that are hard to time, from two gains that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from copris_lightning.core.timing.costs import Costs, Work
from copris_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Measured:
    """A measured gain, and the work that it was measured on.

    Attributes:
        gain: seconds per batch of synchronous RL over those of a staged flow.
        sync: a cycle's work of the former.
        staged: a cycle's work of the latter.
    """

    gain: float
    sync: Work
    staged: Work


def calibrate(points: Sequence[Measured], known: Costs) -> Costs:
    """Find ``train_s`` and ``prefix_s`` under which two measured gains come out exactly.

    While trainer and engine take turns, what there is to do does not depend on what it costs. So
    ``sync seconds = gain * staged seconds`` is linear in both unknowns, and two points are two
    equations.

    Args:
        points: two, of different work.
        known: all other costs; its ``train_s`` and ``prefix_s`` are not looked at.

    Raises:
        ConfigurationError: there are not two, or no costs of at least 0 explain them.
    """
    if len(points) != 2:
        raise ConfigurationError(f"measured: {len(points)} gains, and two costs are to be found")
    rest = replace(known, train_s=0.0, prefix_s=0.0)
    (a, b, e), (c, d, f) = (
        (
            point.sync.trained - point.gain * point.staged.trained,
            point.sync.prefix - point.gain * point.staged.prefix,
            point.gain * point.staged.seconds(rest) - point.sync.seconds(rest),
        )
        for point in points
    )
    determinant = a * d - b * c
    if determinant:
        train_s, prefix_s = (e * d - b * f) / determinant, (a * f - e * c) / determinant
        if train_s >= 0 and prefix_s >= 0:
            return replace(known, train_s=train_s, prefix_s=prefix_s)
    gains = " and ".join(f"{point.gain:g}" for point in points)
    raise ConfigurationError(
        f"measured: no train_s and prefix_s of at least 0 give gains of {gains} with these "
        "lengths, sizes and other costs"
    )
