"""The carry-over buffer: which trajectory is where, as a state machine without I/O.

Every admitted trajectory is in exactly one place. Its state changes only like this:

=============  ======================================  ===============================
state          meaning                                 leaves by
=============  ======================================  ===============================
WAITING        admitted, no token asked for yet        ``start`` -> IN_FLIGHT
IN_FLIGHT      the engine is generating it             ``append`` (last token), ``finish``
                                                       -> FINISHED;
                                                       ``carry_over`` -> CARRIED_OVER
CARRIED_OVER   unfinished when a stage ended           ``start`` -> IN_FLIGHT
FINISHED       complete, its reward is still awaited   ``score`` -> SCORED
SCORED         has its reward, siblings have not       last sibling's ``score`` -> READY
READY          the whole group is scored               ``deliver`` -> DELIVERED
DELIVERED      handed to training, once                (gone from the buffer)
EVICTED        its group was taken out by a filter     (gone from the buffer)
=============  ======================================  ===============================

One stage with a cap of 2, groups of 1 and batches of 1::

    admit a, b, c        WAITING: a b c
    start, start         IN_FLIGHT: a b     (the cap; c waits)
    append a .. (eos)    FINISHED: a        start -> IN_FLIGHT: b c
    score a              READY: a           can_deliver() -> the stage ends
    carry_over b, c      CARRIED_OVER: b c
    deliver              DELIVERED: a       next stage: start -> b, then c (oldest first)

**Staleness bound.** A group first started under version *v* may be trained on at version
*v* + K at the latest, K = ``max_staleness``: that is its deadline. Two rules keep every delivered
token's lag within K and never throw work away. Admission: at most (K + 1) x B groups are
outstanding. Hold: a stage ends only when those left behind can still be delivered in time, which,
with B deliveries per version in order of deadline, is the case if the i-th of them (from 0) has a
deadline of at least *version* + 1 + i // B. Delivering the B most urgent groups always satisfies
this, so waiting always ends. K = 0 is synchronous RL: B groups start, and the stage waits for all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from enum import StrEnum
from heapq import heappop, heappush
from typing import Any

from copris_lightning.core.outcome import FinishReason, Verdict
from copris_lightning.core.trajectory import PromptGroup, Trajectory

Key = tuple[int, int]
"""``(group_id, sample)``. Keys sort by age: groups are numbered in order of admission."""


class Status(StrEnum):
    """Where a trajectory is (the table above)."""

    WAITING = "waiting"
    IN_FLIGHT = "in_flight"
    CARRIED_OVER = "carried_over"
    FINISHED = "finished"
    SCORED = "scored"
    READY = "ready"
    DELIVERED = "delivered"
    EVICTED = "evicted"


class CarryOverBuffer:
    """Holds every admitted trajectory until its group is delivered or evicted.

    Args:
        cap: number of trajectories that may be in flight, N'.
        group_size: trajectories per prompt, G.
        batch_groups: groups per batch, B.
        max_new_tokens: limit on a response over all its resumes, in tokens.
        stop_token_ids: tokens that end a response.
        max_staleness: largest lag (policy versions) of a delivered token, K; ``None``: no bound.

    Raises:
        ValueError: a size below its minimum.
    """

    def __init__(
        self,
        *,
        cap: int,
        group_size: int,
        batch_groups: int,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        max_staleness: int | None = None,
    ) -> None:
        for name, value, least in (
            ("cap", cap, 1),
            ("group_size", group_size, 1),
            ("batch_groups", batch_groups, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("max_staleness", 0 if max_staleness is None else max_staleness, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.cap = cap
        self.group_size = group_size
        self.batch_groups = batch_groups
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.max_staleness = max_staleness
        self.version = 0
        self._groups: dict[int, PromptGroup] = {}
        self._status: dict[Key, Status] = {}
        self._counts: Counter[Status] = Counter()
        self._carried: list[Key] = []
        self._waiting: list[Key] = []
        self._admitted = 0
        self._next_group_id = 0

    # -- looking ---------------------------------------------------------------------------

    @property
    def admitted(self) -> int:
        """Trajectories ever admitted: the sum of :meth:`count` over all states."""
        return self._admitted

    def count(self, status: Status) -> int:
        """Trajectories in ``status`` now (DELIVERED and EVICTED: ever)."""
        return self._counts[status]

    @property
    def in_flight(self) -> int:
        """Trajectories in flight now; never above the cap."""
        return self._counts[Status.IN_FLIGHT]

    @property
    def ready_groups(self) -> int:
        """Complete groups that can be delivered."""
        return self._counts[Status.READY] // self.group_size

    def status(self, key: Key) -> Status:
        """Where the trajectory is; KeyError if it is not in the buffer (any more)."""
        return self._status[key]

    def trajectory(self, key: Key) -> Trajectory:
        """The trajectory itself; KeyError if it is not in the buffer (any more)."""
        return self._groups[key[0]].trajectories[key[1]]

    def group(self, group_id: int) -> PromptGroup:
        """The group; KeyError if it is not in the buffer (any more)."""
        return self._groups[group_id]

    def keys(self, status: Status) -> list[Key]:
        """The trajectories in ``status``, oldest first."""
        return sorted(key for key, s in self._status.items() if s is status)

    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory in the buffer, oldest first."""
        for group in self._groups.values():
            yield from group.trajectories

    # -- the way in ------------------------------------------------------------------------

    def may_admit(self) -> bool:
        """Whether the staleness bound leaves room for one more group."""
        if self.max_staleness is None:
            return True
        return len(self._groups) < (self.max_staleness + 1) * self.batch_groups

    def admit(self, prompt_id: str, prompt_index: int, prompt_token_ids: Sequence[int]) -> int:
        """Admit the G trajectories of a prompt and return the group's id."""
        assert self.may_admit(), "the staleness bound leaves no room: ask may_admit() first"
        group_id = self._next_group_id
        self._next_group_id += 1
        prompt = tuple(prompt_token_ids)
        self._groups[group_id] = PromptGroup(
            group_id,
            prompt_index,
            [
                Trajectory(group_id, sample, prompt_id, prompt, self.max_new_tokens)
                for sample in range(self.group_size)
            ],
        )
        for sample in range(self.group_size):
            self._status[group_id, sample] = Status.WAITING
            heappush(self._waiting, (group_id, sample))
        self._counts[Status.WAITING] += self.group_size
        self._admitted += self.group_size
        return group_id

    # -- generation ------------------------------------------------------------------------

    def start(self) -> Trajectory | None:
        """Put the next trajectory in flight: the oldest carried over, else the oldest waiting.

        Returns:
            the trajectory, or ``None`` if the cap is reached or nothing is left to start.
        """
        if self.in_flight >= self.cap:
            return None
        queue = self._carried or self._waiting
        if not queue:
            return None
        key = heappop(queue)
        self._move(key, Status.IN_FLIGHT)
        group = self._groups[key[0]]
        if group.first_version is None:
            group.first_version = self.version
        return group.trajectories[key[1]]

    def append(
        self,
        key: Key,
        token_ids: Sequence[int],
        logprobs: Sequence[float] | None,
        version: int,
        *,
        stops: bool = False,
    ) -> None:
        """Append a chunk; a stop token at its end or the length limit finishes the trajectory.

        Args:
            key: the trajectory.
            token_ids: the tokens, in order.
            logprobs: one per token, or ``None`` (:meth:`Trajectory.append`).
            version: the policy version that made them.
            stops: the response ends with the chunk's last token, whichever that is.

        Raises:
            ValueError: the chunk does not fit the trajectory (:meth:`Trajectory.append`), goes
                on after a stop token, or bears a version that is yet to come.
        """
        self._expect(key, Status.IN_FLIGHT)
        if version > self.version:
            raise ValueError(f"{key}: token of version {version}, current is {self.version}")
        if not self.stop_token_ids.isdisjoint(token_ids[:-1]):
            raise ValueError(f"{key}: tokens follow a stop token in {list(token_ids)}")
        trajectory = self.trajectory(key)
        trajectory.append(token_ids, logprobs, version)
        if stops or (token_ids and token_ids[-1] in self.stop_token_ids):
            self.finish(key, "stop")
        elif trajectory.remaining_tokens == 0:
            self.finish(key, "length")

    def finish(self, key: Key, reason: FinishReason) -> None:
        """The response is complete; its reward is awaited."""
        self._expect(key, Status.IN_FLIGHT)
        self.trajectory(key).finish(reason)
        self._move(key, Status.FINISHED)

    def carry_over(self) -> list[Key]:
        """The stage ends: everything in flight becomes carried over. Returns what moved."""
        keys = self.keys(Status.IN_FLIGHT)
        for key in keys:
            self._move(key, Status.CARRIED_OVER)
            heappush(self._carried, key)
        return keys

    # -- scoring and the way out -----------------------------------------------------------

    def score(self, key: Key, reward: float) -> bool:
        """Set a finished trajectory's reward. Returns whether its group is now ready."""
        self._expect(key, Status.FINISHED)
        self.trajectory(key).judge(Verdict.of(reward))
        self._move(key, Status.SCORED)
        siblings = [(key[0], sample) for sample in range(self.group_size)]
        if any(self._status[sibling] is not Status.SCORED for sibling in siblings):
            return False
        for sibling in siblings:
            self._move(sibling, Status.READY)
        return True

    def evict(self, group_id: int) -> PromptGroup:
        """Take a ready group out of the buffer without training on it (a filter's choice)."""
        return self._remove(group_id, Status.EVICTED)

    def can_deliver(self) -> bool:
        """Whether a batch is ready and what stays behind can meet its deadlines."""
        ready = self._ready()
        if len(ready) < self.batch_groups:
            return False
        if self.max_staleness is None:
            return True
        leaving = {group.group_id for group in ready[: self.batch_groups]}
        deadlines = sorted(
            group.first_version + self.max_staleness
            for group in self._groups.values()
            if group.first_version is not None and group.group_id not in leaving
        )
        return all(
            deadline >= self.version + 1 + i // self.batch_groups
            for i, deadline in enumerate(deadlines)
        )

    def deliver(self) -> list[PromptGroup]:
        """Hand over a batch of B complete groups, the most urgent first.

        Raises:
            ValueError: fewer groups are ready (ask :meth:`can_deliver`).
        """
        ready = self._ready()[: self.batch_groups]
        if len(ready) < self.batch_groups:
            raise ValueError(f"{len(ready)} groups are ready, a batch takes {self.batch_groups}")
        groups = [self._remove(group.group_id, Status.DELIVERED) for group in ready]
        if self.max_staleness is not None:
            labels = (s.version for g in groups for t in g.trajectories for s in t.segments)
            oldest = min((v for v in labels if v is not None), default=self.version)
            assert self.version - oldest <= self.max_staleness, "staleness bound broken"
        return groups

    def advance(self, version: int) -> None:
        """The engine has new weights: later tokens bear ``version``.

        Raises:
            ValueError: the version does not rise, or trajectories are in flight.
        """
        if version < self.version:
            raise ValueError(f"version {version} follows version {self.version}")
        if version != self.version and self.in_flight:
            raise ValueError(f"{self.in_flight} trajectories are in flight during a weight sync")
        self.version = version

    # -- saving ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values and tensors. What is in flight is saved as carried over."""
        saved = {Status.IN_FLIGHT: Status.CARRIED_OVER}
        return {
            "version": self.version,
            "group_size": self.group_size,
            "max_new_tokens": self.max_new_tokens,
            "next_group_id": self._next_group_id,
            "admitted": self._admitted,
            "delivered": self.count(Status.DELIVERED),
            "evicted": self.count(Status.EVICTED),
            "groups": [
                {
                    **group.state_dict(),
                    "status": [
                        str(saved.get(s, s))
                        for s in (self._status[group.group_id, i] for i in range(self.group_size))
                    ],
                }
                for group in self._groups.values()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by a saved one. The cap, B and K may differ from those saved under.

        Raises:
            ValueError: the group size or the response limit differs from the saved one, or the
                saved groups cannot all be delivered within this run's K.
        """
        for name in ("group_size", "max_new_tokens"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved rollout state has {name}={state[name]}, this run has "
                    f"{getattr(self, name)}: unfinished groups cannot change it"
                )
        firsts = (group["first_version"] for group in state["groups"])
        begun = sorted(state["version"] if first is None else first for first in firsts)
        # Delivered oldest first, B per version from now on, this is the largest lag.
        lags = (state["version"] + i // self.batch_groups - v for i, v in enumerate(begun))
        needed = max(lags, default=0)
        if self.max_staleness is not None and needed > self.max_staleness:
            raise ValueError(
                f"the saved rollout state holds {len(begun)} groups, and with "
                f"batch_groups={self.batch_groups} the last can be trained on at lag {needed}: "
                f"set max_staleness={self.max_staleness} to at least {needed}"
            )
        self.version = state["version"]
        self._next_group_id = state["next_group_id"]
        self._admitted = state["admitted"]
        self._groups, self._status = {}, {}
        self._counts = Counter(
            {Status.DELIVERED: state["delivered"], Status.EVICTED: state["evicted"]}
        )
        self._carried, self._waiting = [], []
        queues = {Status.CARRIED_OVER: self._carried, Status.WAITING: self._waiting}
        for saved in state["groups"]:
            group = PromptGroup.from_state({k: v for k, v in saved.items() if k != "status"})
            self._groups[group.group_id] = group
            for sample, name in enumerate(saved["status"]):
                key, status = (group.group_id, sample), Status(name)
                self._status[key] = status
                self._counts[status] += 1
                if status in queues:
                    heappush(queues[status], key)

    # -- inside ----------------------------------------------------------------------------

    def _ready(self) -> list[PromptGroup]:
        """The ready groups, most urgent first."""
        ready = [g for g in self._groups.values() if self._is_ready(g.group_id)]
        return sorted(ready, key=lambda group: (group.first_version, group.group_id))

    def _is_ready(self, group_id: int) -> bool:
        return self._status[group_id, 0] is Status.READY

    def _remove(self, group_id: int, status: Status) -> PromptGroup:
        assert self._is_ready(group_id), f"group {group_id} is not ready"
        for sample in range(self.group_size):
            self._move((group_id, sample), status)
            del self._status[group_id, sample]
        return self._groups.pop(group_id)

    def _expect(self, key: Key, status: Status) -> None:
        assert self._status[key] is status, f"{key} is {self._status[key]}, not {status}"

    def _move(self, key: Key, status: Status) -> None:
        self._counts[self._status[key]] -= 1
        self._counts[status] += 1
        self._status[key] = status
