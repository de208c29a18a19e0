"""What a buffer holds, with the indices that make each step as quick however much that is.

No rules: who may go where is :mod:`copris_lightning.core.buffer`'s to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor

from copris_lightning.core.saved import SavedGroups
from copris_lightning.core.trajectory import PromptGroup, Trajectory

Key = tuple[int, int]
"""``(group_id, sample)``. Keys sort by age: groups are numbered in order of admission."""


class Status(StrEnum):
    """Where a trajectory is (the buffer's table says what each means)."""

    WAITING = "waiting"
    IN_FLIGHT = "in_flight"
    CARRIED_OVER = "carried_over"
    FINISHED = "finished"
    SCORED = "scored"
    READY = "ready"
    TAKEN = "taken"
    DELIVERED = "delivered"
    EVICTED = "evicted"


_GONE = (Status.DELIVERED, Status.EVICTED)
_QUEUED = (Status.WAITING, Status.CARRIED_OVER)
_REWARDED = (Status.SCORED, Status.READY)
_SAVED = (Status.WAITING, Status.CARRIED_OVER, Status.FINISHED, Status.SCORED, Status.READY)
"""Where a saved trajectory may be, by the number that says so."""


class Contents:
    """Groups, the status of each of their trajectories, and the trajectories of each status.

    Of a taken group it holds the statuses only, of one that is gone the number.

    Args:
        group_size: trajectories per group, G.
    """

    def __init__(self, group_size: int) -> None:
        self.admitted = 0
        self._group_size = group_size
        self._groups: dict[int, PromptGroup] = {}
        self._status: dict[Key, Status] = {}
        self._keys: dict[Status, set[Key]] = {status: set() for status in Status}
        self._gone: Counter[Status] = Counter()
        self._queue: list[tuple[bool, Key]] = []  # what was carried over sorts first
        self._unscored: dict[int, int] = {}

    def __len__(self) -> int:
        """Groups, taken ones not among them."""
        return len(self._groups)

    def __iter__(self) -> Iterator[PromptGroup]:
        """The groups, oldest first."""
        return iter(self._groups.values())

    def group(self, group_id: int) -> PromptGroup:
        """A group; KeyError if it is taken or gone."""
        return self._groups[group_id]

    def trajectory(self, key: Key) -> Trajectory:
        """A trajectory; KeyError if its group is taken or gone."""
        return self._groups[key[0]].trajectories[key[1]]

    def status(self, key: Key) -> Status:
        """Where a trajectory is; KeyError if it is gone."""
        return self._status[key]

    def count(self, status: Status) -> int:
        """Trajectories of a status, those that are gone included."""
        return len(self._keys[status]) + self._gone[status]

    def groups_of(self, status: Status) -> int:
        """Groups of a status that siblings have together: READY and what follows it."""
        return self.count(status) // self._group_size

    def keys(self, status: Status) -> list[Key]:
        """The trajectories of a status, oldest first; not those that are gone."""
        return sorted(self._keys[status])

    def admit(self, group: PromptGroup) -> None:
        """A new group: its trajectories wait."""
        self._groups[group.group_id] = group
        self._put(group.group_id, [Status.WAITING] * self._group_size)
        self.admitted += self._group_size

    def next_queued(self) -> Key | None:
        """Unqueue the oldest that is carried over, else the oldest that waits, if there is one."""
        return heappop(self._queue)[1] if self._queue else None

    def move(self, key: Key, status: Status) -> None:
        """A trajectory's status changes."""
        self._keys[self._status.pop(key)].remove(key)
        if status in _GONE:
            self._gone[status] += 1
        else:
            self._place(key, status)

    def move_group(self, group_id: int, status: Status) -> None:
        """The status of siblings changes together; beyond READY the group itself is let go."""
        for key in self._siblings(group_id):
            self.move(key, status)
        if status is not Status.READY:
            self._groups.pop(group_id, None)

    def score(self, key: Key) -> bool:
        """A trajectory has its reward. Returns whether all siblings have."""
        self.move(key, Status.SCORED)
        self._unscored[key[0]] -= 1
        if self._unscored[key[0]]:
            return False
        del self._unscored[key[0]]
        return True

    # -- saving ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors. What is in flight is saved as carried over."""
        return {
            "admitted": self.admitted,
            "delivered": self.count(Status.DELIVERED),
            "evicted": self.count(Status.EVICTED),
            "taken": [group_id for group_id, sample in self.keys(Status.TAKEN) if sample == 0],
            "groups": SavedGroups.of(self).state_dict(),
            "places": self._saved_places(),
        }

    @classmethod
    def from_state(cls, group_size: int, state: dict[str, Any]) -> Contents:
        """The inverse of :meth:`state_dict`."""
        contents = cls(group_size)
        contents.admitted = state["admitted"]
        contents._gone.update({status: state[str(status)] for status in _GONE})
        for group_id in state["taken"]:
            contents._put(group_id, [Status.TAKEN] * group_size)
        groups = SavedGroups.from_state(state["groups"]).groups()
        for group, places in zip(groups, state["places"].tolist(), strict=True):
            contents._groups[group.group_id] = group
            contents._put(group.group_id, [_SAVED[place] for place in places])
        return contents

    def _saved_places(self) -> Tensor:
        """Of each trajectory ``[N, G]``, uint8, as places in :data:`_SAVED`."""
        codes = {status: code for code, status in enumerate(_SAVED)}
        codes[Status.IN_FLIGHT] = codes[Status.CARRIED_OVER]
        keys = (key for group_id in self._groups for key in self._siblings(group_id))
        found = [codes[self._status[key]] for key in keys]
        return torch.tensor(found, dtype=torch.uint8).reshape(-1, self._group_size)

    # -- inside ----------------------------------------------------------------------------

    def _siblings(self, group_id: int) -> list[Key]:
        return [(group_id, sample) for sample in range(self._group_size)]

    def _put(self, group_id: int, statuses: list[Status]) -> None:
        for key, status in zip(self._siblings(group_id), statuses, strict=True):
            self._place(key, status)
        unscored = sum(status not in _REWARDED for status in statuses)
        if unscored and group_id in self._groups:
            self._unscored[group_id] = unscored

    def _place(self, key: Key, status: Status) -> None:
        self._status[key] = status
        self._keys[status].add(key)
        if status in _QUEUED:
            heappush(self._queue, (status is Status.WAITING, key))
