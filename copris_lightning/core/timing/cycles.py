"""A run's cycles in seconds: take, train, new weights; the scheduler's rules, and no tokens.

Which trajectory goes next, when a batch is ready and who waits for the staleness bound is not
modelled: it is asked of the :class:`CarryOverBuffer` that runs have. What is modelled is time.
"""

from __future__ import annotations

from dataclasses import dataclass

from copris_lightning.core.buffer import CarryOverBuffer, Key
from copris_lightning.core.timing.costs import Costs, Work
from copris_lightning.core.timing.decoding import Decoding
from copris_lightning.core.timing.lengths import Draws
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Flow:
    """What happens to generation when a batch is taken and when new weights come.

    Attributes:
        streams: it goes on while the trainer trains, on devices of its own.
        keeps: keys and values outlive a hold, and nothing is computed again.
        max_staleness: largest lag of a trained token in versions; ``None``: no bound. 0 is
            synchronous RL.
    """

    streams: bool = False
    keeps: bool = False
    max_staleness: int | None = None


@dataclass(frozen=True)
class Sizes:
    """What a run has many of.

    Attributes:
        groups: of a batch, B.
        group_size: trajectories of a group, G.
        limit: tokens of a response at most.
        prompt: tokens of a prompt.
    """

    groups: int
    group_size: int
    limit: int
    prompt: int = 0

    def __post_init__(self) -> None:
        for name, least in (("groups", 1), ("group_size", 1), ("limit", 1), ("prompt", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class Cycle:
    """The mean cycle of a run: from one batch to the next.

    Attributes:
        seconds: it takes.
        work: there is to do in it.
        idle: share of its time in which the trainer waits for a batch.
        lag_mean: versions between the first token of a trained group and its training.
        lag_max: the largest of these.
    """

    seconds: float
    work: Work
    idle: float
    lag_mean: float
    lag_max: int

    @property
    def in_flight(self) -> float:
        """Trajectories in flight, the mean over decoding steps."""
        return self.work.slots / self.work.steps if self.work.steps else 0.0


class Cycles:
    """A run that makes no tokens.

    Args:
        draws: how long each response will be.
        sizes: of batches, groups and responses.
        costs: of the work, in seconds.
        flow: when generation goes on.
        cap: trajectories in flight at most.

    Raises:
        ConfigurationError: a cap below 1.
    """

    def __init__(self, draws: Draws, sizes: Sizes, costs: Costs, flow: Flow, cap: int) -> None:
        if cap < 1:
            raise ConfigurationError(f"cap={cap} must be at least 1")
        self.buffer = CarryOverBuffer(
            limit=cap,
            group_size=sizes.group_size,
            batch_groups=sizes.groups,
            max_new_tokens=sizes.limit,
            max_staleness=flow.max_staleness,
        )
        self.decoding = Decoding(costs)
        self._draws, self._sizes, self._costs, self._flow = draws, sizes, costs, flow
        self._lengths: dict[int, list[int]] = {}
        self._carried: dict[Key, int] = {}
        self._trained = self._batches = 0
        self._lags: list[int] = []
        self._waited = 0.0

    def mean(self, batches: int, warm_up: int) -> Cycle:
        """Run, and look at the last of it: the first batches of a run have the short responses.

        Args:
            batches: to take the mean over.
            warm_up: before these.
        """
        for _ in range(warm_up):
            self.cycle()
        begun, before, waited = self.decoding.now, self._done(), self._waited
        self._lags = []
        for _ in range(batches):
            self.cycle()
        seconds = self.decoding.now - begun
        work = [(now - then) / batches for now, then in zip(self._done(), before, strict=True)]
        return Cycle(
            seconds=seconds / batches,
            work=Work(*work),
            idle=(self._waited - waited) / seconds if seconds else 0.0,
            lag_mean=sum(self._lags) / len(self._lags),
            lag_max=max(self._lags),
        )

    def cycle(self) -> float:
        """One batch and the new weights that follow it. Returns its seconds."""
        begun = self.decoding.now
        while not self.buffer.can_take():
            self._fill()
            self._end(self.decoding.run())
        if not (self._flow.streams or self._flow.keeps):
            self._end_streams()
        ready = self.decoding.now
        self._waited += ready - begun
        training = self._taken(self.buffer.take())
        if self._flow.streams:
            self._go_on(ready + training)
        else:
            self.decoding.now += training
        if not self._flow.keeps:
            self._end_streams()
        self.decoding.now += self._costs.sync_s
        self.buffer.advance(self.buffer.version + 1)
        if self._flow.streams:
            self._fill()
        return self.decoding.now - begun

    def _taken(self, groups: list[PromptGroup]) -> float:
        """A batch. Returns what its training takes, in seconds."""
        tokens = sum(sum(self._lengths.pop(group.group_id)) for group in groups)
        self._lags += [self.buffer.version - (group.first_version or 0) for group in groups]
        self._trained += tokens
        self._batches += 1
        return self._costs.train_s * tokens + self._costs.batch_s

    def _go_on(self, until: float) -> None:
        """Generate while the trainer trains."""
        self._fill()
        while self.decoding.now < until:
            self._end(self.decoding.run(until))
            self._fill()

    def _fill(self) -> None:
        """Start trajectories up to the cap, as far as the bound allows."""
        while self.decoding.in_flight < self.buffer.limit:
            trajectory = self.buffer.next()
            if trajectory is not None:
                key = (trajectory.group_id, trajectory.sample)
                made = self._carried.pop(key, 0)
                length = self._lengths[key[0]][key[1]]
                self.decoding.start(key, self._sizes.prompt, made, length)
            elif self.buffer.may_admit():
                group = self.buffer.admit("", 0, ())
                self._lengths[group] = self._draws.group(group, self._sizes.limit)
            else:
                return

    def _end(self, keys: list[Key]) -> None:
        """Responses are complete, and scored at once."""
        for key in keys:
            made = self.decoding.leave(key, self._sizes.prompt)
            self.buffer.finish(key, "length" if made == self._sizes.limit else "stop")
            self.buffer.score(key, 0.0)

    def _end_streams(self) -> None:
        """What is in flight is carried over; its prefixes will be sent again."""
        self._carried.update(self.decoding.end_streams())
        self.buffer.carry_over()

    def _done(self) -> Work:
        """All work until now."""
        return self.decoding.work._replace(trained=self._trained, batches=self._batches)
