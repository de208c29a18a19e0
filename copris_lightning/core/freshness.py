"""How old the groups are that training still waits for, and whether all can be trained on in time.

A group first started under version *v* may be trained on at version *v* + K at the latest, K =
``max_staleness``: its deadline. No token of it is older than *v*, so no trained token's lag exceeds
K. At each version B groups leave, the oldest first. Two rules keep all deadlines, and throw no
work away:

**Admission.** At most (K + 1) x B groups are outstanding, the taken ones among them until the next
rise of the version. So at most K x B others can have been started by the time it rises.

**Waiting.** At version V a batch is taken only if those that stay behind can still leave in time.
B of them leave at each of V + 1, ..., V + j, so for j = 0, ..., K at most j x B of them may have a
deadline of V + j or less; and since the oldest leave first, that is enough. Deadlines are first
versions plus K, so a histogram of versions answers it, however many groups there are.

Waiting always ends: after a take at V at most j x B have a deadline of V + j or less, which at
V + 1 reads (j + 1) x B with one of V + 1 + j or less (for j = K because of the admission), and
taking the B oldest makes it j x B again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush

from copris_lightning.core.trajectory import PromptGroup


class Freshness:
    """The first versions of the groups that were started and have not left yet.

    Args:
        max_staleness: largest lag (policy versions) of a trained token, K; ``None``: no bound.
    """

    def __init__(self, max_staleness: int | None) -> None:
        self.max_staleness = max_staleness
        self._started: Counter[int] = Counter()
        self._ready: Counter[int] = Counter()
        self._by_urgency: list[tuple[int, int]] = []
        self._dropped: set[int] = set()

    def may_admit(self, outstanding: int, batch_groups: int) -> bool:
        """Whether there may be one more group than those outstanding, taken ones included."""
        if self.max_staleness is None:
            return True
        return outstanding < (self.max_staleness + 1) * batch_groups

    def check(self, first_versions: Sequence[int], version: int, batch_groups: int) -> None:
        """Refuse saved groups that cannot all be trained on in time.

        Args:
            first_versions: theirs.
            version: at which the first batch of them can be taken.
            batch_groups: how many leave at each version, B.

        Raises:
            ValueError: says which bound they need.
        """
        needed = needed_staleness(first_versions, version, batch_groups)
        if self.max_staleness is not None and needed > self.max_staleness:
            raise ValueError(
                f"the saved rollout state holds {len(first_versions)} groups, and with "
                f"batch_groups={batch_groups} the last can be trained on at lag {needed}: "
                f"set max_staleness={self.max_staleness} to at least {needed}"
            )

    def start(self, group: PromptGroup) -> None:
        """The group's first trajectory was started."""
        self._started[_first_version(group)] += 1

    def complete(self, group: PromptGroup) -> None:
        """The group is ready to leave."""
        first = _first_version(group)
        self._ready[first] += 1
        heappush(self._by_urgency, (first, group.group_id))

    def take(self, version: int, count: int) -> list[int]:
        """Let the most urgent of the ready groups leave: of the oldest version, then the oldest.

        Args:
            version: the current one.
            count: how many; so many must be ready.

        Returns:
            their ids.
        """
        taken: list[int] = []
        while len(taken) < count:
            first, group_id = heappop(self._by_urgency)
            if group_id in self._dropped:
                self._dropped.remove(group_id)
                continue
            assert self.max_staleness is None or version - first <= self.max_staleness, (
                f"staleness bound broken: group {group_id} is of version {first}, now is {version}"
            )
            self._leave(first)
            taken.append(group_id)
        return taken

    def drop(self, group: PromptGroup) -> None:
        """Let this ready group leave."""
        self._dropped.add(group.group_id)
        self._leave(_first_version(group))

    def can_take(self, version: int, batch_groups: int) -> bool:
        """Whether B are ready, and those left behind keep their deadlines if the B most urgent go.

        Args:
            version: the current one, V.
            batch_groups: how many leave now and at each version to come, B.
        """
        ready = len(self._by_urgency) - len(self._dropped)
        if ready < batch_groups:
            return False
        if self.max_staleness is None:
            return True
        started = self._started.total()
        for j in range(self.max_staleness, -1, -1):
            # Both count deadlines of V + j or less. Those that go are the most urgent of the
            # ready, so that as many of them are this urgent as there are, up to B.
            if started - min(ready, batch_groups) > j * batch_groups:
                return False
            first = version + j - self.max_staleness
            started -= self._started[first]
            ready -= self._ready[first]
        return True

    def _leave(self, first: int) -> None:
        for counts in (self._started, self._ready):
            counts[first] -= 1
            if not counts[first]:
                del counts[first]


def _first_version(group: PromptGroup) -> int:
    assert group.first_version is not None, f"group {group.group_id} was never started"
    return group.first_version


def needed_staleness(first_versions: Iterable[int], version: int, batch_groups: int) -> int:
    """The smallest K that groups can be trained under, the oldest first.

    Args:
        first_versions: of all groups.
        version: at which the first batch of them can be taken.
        batch_groups: how many leave at each version, B.
    """
    oldest_first = enumerate(sorted(first_versions))
    return max((version + i // batch_groups - first for i, first in oldest_first), default=0)
