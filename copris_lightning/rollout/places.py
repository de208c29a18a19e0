"""The places in flight on an engine: how many there are now, by its load."""

from __future__ import annotations

from copris_lightning.core.cap import Cap
from copris_lightning.engines.engine import Engine


class Places:
    """Keeps the limit that a :class:`Cap` makes of an engine's load, trajectory by trajectory.

    The limit falls by the place of a trajectory that has ended, at most, and takes none from one in
    flight. To end a stream would not make room that the engine does not make itself, which puts
    back what does not fit; and its keys and values would have to be computed again either way.

    Args:
        engine: is asked for its load.
        cap: bounds of the limit.
    """

    def __init__(self, engine: Engine, cap: Cap) -> None:
        self._engine = engine
        self._cap = cap
        self._limits: dict[object, float] = {None: float(cap.least)}
        self._preemptions = 0

    def limit(self, alone: object = None) -> float:
        """How many there are; a fraction is a part of the way to the next.

        Args:
            alone: who has the engine alone, and so a limit of their own, since their responses are
                of another length. It begins where that of the others is.
        """
        return self._limits.get(alone, self._limits[None])

    def restore(self, limit: float) -> None:
        """Go on from a saved limit, as far as the bounds allow."""
        self._limits[None] = self._cap.clip(limit)

    def forget(self, alone: object) -> None:
        """They are done."""
        self._limits.pop(alone, None)

    def begin(self) -> None:
        """The engine runs: what it put back before is no news."""
        load = None if self._cap.is_fixed else self._engine.load()
        self._preemptions = load.preemptions if load else 0

    def ended(self, alone: object, in_flight: int) -> None:
        """A trajectory has ended, and so many are left in flight."""
        if self._cap.is_fixed:
            return
        load, limit = self._engine.load(), self.limit(alone)
        preempted = 0
        if load is not None:
            preempted, self._preemptions = load.preemptions - self._preemptions, load.preemptions
        self._limits[alone] = self._cap(
            load, limit, preempted=preempted, is_full=in_flight + 1 >= int(limit)
        )
