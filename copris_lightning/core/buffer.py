"""The carry-over buffer: which trajectory is where, as a state machine without I/O.

Every admitted trajectory is in exactly one place. Its state changes only like this:

=============  ======================================  ===============================
state          meaning                                 leaves by
=============  ======================================  ===============================
WAITING        admitted, no token asked for yet        ``next`` -> IN_FLIGHT
IN_FLIGHT      the engine is generating it             ``append`` (last token), ``finish``
                                                       -> FINISHED; ``yield_place``,
                                                       ``carry_over`` -> CARRIED_OVER
CARRIED_OVER   unfinished when it left the engine      ``next`` -> IN_FLIGHT
FINISHED       complete, its reward is still awaited   ``score`` -> SCORED
SCORED         has its reward, siblings have not       last sibling's ``score`` -> READY
READY          the whole group is scored               ``take`` -> TAKEN;
                                                       ``evict`` -> EVICTED
TAKEN          handed to training, once, which has     ``advance`` (a rise), ``settle``,
               not ended with a rise yet               the next ``take`` -> DELIVERED
DELIVERED      training is over                        (gone from the buffer)
EVICTED        its group was taken out by a filter     (gone from the buffer)
=============  ======================================  ===============================

One batch with a limit of 2, groups of 1 and batches of 1::

    admit a, b, c        WAITING: a b c
    next, next           IN_FLIGHT: a b     (the limit; c waits)
    append a .. (eos)    FINISHED: a        next -> IN_FLIGHT: b c
    score a              READY: a           can_take() -> the engine may be held
    carry_over           CARRIED_OVER: b c
    take                 TAKEN: a           training
    advance(1)           DELIVERED: a       next -> b, then c (oldest first)

Nothing need be carried over for a take or a rise: what is in flight may stay (streaming).

**Places.** In flight are never more than the limit, but for what was in flight already when it was
lowered: nothing is started until that is below it. With a bound K on the staleness at most
(K + 1) x B groups are outstanding: all that are in the buffer, taken ones included. These keep
their place until the version rises, since until then whatever is started in it is as old as what
was left behind; an evicted group frees its place at once. Why that bounds every trained token's lag
by K, and when a batch can be taken: :mod:`copris_lightning.core.freshness`. K = 0 is synchronous
RL: B groups start, and the batch waits for all.

No call looks at more trajectories than it moves, whatever is in the buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from copris_lightning.core.contents import Contents, Key, Status
from copris_lightning.core.freshness import Freshness
from copris_lightning.core.outcome import FinishReason, Verdict
from copris_lightning.core.saved import SavedGroups
from copris_lightning.core.trajectory import PromptGroup, Trajectory

__all__ = ["CarryOverBuffer", "Key", "Status"]


class CarryOverBuffer:
    """Holds every admitted trajectory until its group is taken or evicted.

    Args:
        limit: number of trajectories that may be in flight; may be changed at any time.
        group_size: trajectories per prompt, G.
        batch_groups: groups per batch, B.
        max_new_tokens: limit on a response over all its resumes, in tokens.
        stop_token_ids: tokens that end a response.
        max_staleness: largest lag (policy versions) of a trained token, K; ``None``: no bound.

    Attributes:
        version: the policy version of tokens to come.

    Raises:
        ValueError: a size below its minimum.
    """

    def __init__(
        self,
        *,
        limit: int,
        group_size: int,
        batch_groups: int,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        max_staleness: int | None = None,
    ) -> None:
        for name, value, least in (
            ("limit", limit, 1),
            ("group_size", group_size, 1),
            ("batch_groups", batch_groups, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("max_staleness", 0 if max_staleness is None else max_staleness, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.limit = limit
        self.group_size = group_size
        self.batch_groups = batch_groups
        self.max_new_tokens = max_new_tokens
        self.stop_token_ids = frozenset(stop_token_ids)
        self.version = 0
        self._contents = Contents(group_size)
        self._freshness = Freshness(max_staleness)

    # -- looking ---------------------------------------------------------------------------

    @property
    def admitted(self) -> int:
        """Trajectories ever admitted: the sum of :meth:`count` over all states."""
        return self._contents.admitted

    def count(self, status: Status) -> int:
        """Trajectories in ``status`` now (DELIVERED and EVICTED: ever)."""
        return self._contents.count(status)

    @property
    def in_flight(self) -> int:
        """Trajectories in flight now."""
        return self._contents.count(Status.IN_FLIGHT)

    @property
    def ready_groups(self) -> int:
        """Complete groups that can be taken."""
        return self._contents.groups_of(Status.READY)

    def status(self, key: Key) -> Status:
        """Where the trajectory is; KeyError if it is not in the buffer (any more)."""
        return self._contents.status(key)

    def trajectory(self, key: Key) -> Trajectory:
        """The trajectory itself; KeyError if it is not in the buffer (any more)."""
        return self._contents.trajectory(key)

    def group(self, group_id: int) -> PromptGroup:
        """The group; KeyError if it is not in the buffer (any more)."""
        return self._contents.group(group_id)

    def keys(self, status: Status) -> list[Key]:
        """The trajectories in ``status``, oldest first."""
        return self._contents.keys(status)

    def trajectories(self) -> Iterator[Trajectory]:
        """Every trajectory in the buffer, oldest first; taken ones are with whoever took them."""
        for group in self._contents:
            yield from group.trajectories

    # -- the way in ------------------------------------------------------------------------

    def may_admit(self) -> bool:
        """Whether the staleness bound leaves room for one more group."""
        outstanding = len(self._contents) + self._contents.groups_of(Status.TAKEN)
        return self._freshness.may_admit(outstanding, self.batch_groups)

    def admit(self, prompt_id: str, prompt_index: int, prompt_token_ids: Sequence[int]) -> int:
        """Admit the G trajectories of a prompt and return the group's id."""
        assert self.may_admit(), "the staleness bound leaves no room: ask may_admit() first"
        group_id = self.admitted // self.group_size
        prompt = tuple(prompt_token_ids)
        trajectories = [
            Trajectory(group_id, sample, prompt_id, prompt, self.max_new_tokens)
            for sample in range(self.group_size)
        ]
        self._contents.admit(PromptGroup(group_id, prompt_index, trajectories))
        return group_id

    # -- generation ------------------------------------------------------------------------

    def next(self) -> Trajectory | None:
        """Put the next trajectory in flight: the oldest carried over, else the oldest waiting.

        Returns:
            the trajectory, or ``None`` if the limit is reached or nothing is left to start.
        """
        key = self._contents.next_queued() if self.in_flight < self.limit else None
        if key is None:
            return None
        self._contents.move(key, Status.IN_FLIGHT)
        group = self.group(key[0])
        if group.first_version is None:
            group.first_version = self.version
            self._freshness.start(group)
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
                on after a stop token, or bears a version that is yet to come or was over when
                the group began.
        """
        self._expect(key, Status.IN_FLIGHT)
        if version > self.version:
            raise ValueError(f"{key}: token of version {version}, current is {self.version}")
        if version < (self.group(key[0]).first_version or 0):
            raise ValueError(f"{key}: token of version {version}, older than its group")
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
        self._contents.move(key, Status.FINISHED)

    def yield_place(self, key: Key) -> None:
        """One trajectory leaves the engine unfinished, and its place to another."""
        self._expect(key, Status.IN_FLIGHT)
        self._contents.move(key, Status.CARRIED_OVER)

    def carry_over(self) -> list[Key]:
        """All that is in flight leaves the engine unfinished. Returns what moved."""
        keys = self.keys(Status.IN_FLIGHT)
        for key in keys:
            self.yield_place(key)
        return keys

    # -- scoring and the way out -----------------------------------------------------------

    def score(self, key: Key, reward: float) -> bool:
        """Set a finished trajectory's reward. Returns whether its group is now ready."""
        self._expect(key, Status.FINISHED)
        self.trajectory(key).judge(Verdict.of(reward))
        if not self._contents.score(key):
            return False
        self._contents.move_group(key[0], Status.READY)
        self._freshness.complete(self.group(key[0]))
        return True

    def evict(self, group_id: int) -> PromptGroup:
        """Take a ready group out of the buffer without training on it (a filter's choice)."""
        self._expect((group_id, 0), Status.READY)
        group = self.group(group_id)
        self._freshness.drop(group)
        self._contents.move_group(group_id, Status.EVICTED)
        return group

    def can_take(self) -> bool:
        """Whether a batch is ready and what stays behind can meet its deadlines."""
        return self._freshness.can_take(self.version, self.batch_groups)

    def take(self) -> list[PromptGroup]:
        """Hand over a batch of B complete groups, the most urgent first.

        Raises:
            ValueError: fewer groups are ready (ask :meth:`can_take`).
        """
        if self.ready_groups < self.batch_groups:
            ready = self.ready_groups
            raise ValueError(f"{ready} groups are ready, a batch takes {self.batch_groups}")
        self.settle()
        taken = self._freshness.take(self.version, self.batch_groups)
        groups = [self.group(group_id) for group_id in taken]
        for group_id in taken:
            self._contents.move_group(group_id, Status.TAKEN)
        return groups

    def settle(self) -> None:
        """The next take begins: what was taken before has been trained on, and frees its place."""
        for key in self.keys(Status.TAKEN):
            self._contents.move(key, Status.DELIVERED)

    def advance(self, version: int) -> None:
        """The engine has new weights: later tokens bear ``version``. A rise settles.

        Raises:
            ValueError: the version falls.
        """
        if version < self.version:
            raise ValueError(f"version {version} follows version {self.version}")
        if version > self.version:
            self.settle()
        self.version = version

    # -- saving ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. What is in flight is saved as carried over, of taken groups the
        ids only.

        The batch is for whoever took it to save.
        """
        return {
            "version": self.version,
            "group_size": self.group_size,
            "max_new_tokens": self.max_new_tokens,
            **self._contents.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by a saved one. The limit, B and K may differ from those saved under.

        Raises:
            ValueError: the group size or the response limit differs from the saved one, or the
                saved groups cannot all be trained on within this run's K.
        """
        self.check(state)
        self.version = state["version"]
        self._contents = Contents.from_state(self.group_size, state)
        self._freshness = Freshness(self._freshness.max_staleness)
        for group in self._contents:
            if group.first_version is not None:
                self._freshness.start(group)
            if self.status((group.group_id, 0)) is Status.READY:
                self._freshness.complete(group)

    def check(self, state: dict[str, Any]) -> None:
        """Refuse a state that :meth:`load_state_dict` refuses, in the same words; load nothing."""
        for name in ("group_size", "max_new_tokens"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved rollout state has {name}={state[name]}, this run has "
                    f"{getattr(self, name)}: unfinished groups cannot change it"
                )
        firsts = SavedGroups.from_state(state["groups"]).first_versions.tolist()
        begun = [state["version"] if first < 0 else first for first in firsts]
        # While a batch is out, the first of them leave at the version that follows.
        leaving = state["version"] + bool(state["taken"])
        self._freshness.check(begun, leaving, self.batch_groups)

    # -- inside ----------------------------------------------------------------------------

    def _expect(self, key: Key, status: Status) -> None:
        assert self.status(key) is status, f"{key} is {self.status(key)}, not {status}"
