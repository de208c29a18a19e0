"""When a batch may be taken: a histogram of versions against deadlines that are sorted out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.buffer import CarryOverBuffer, Status
from copris_lightning.core.freshness import Freshness, needed_staleness
from copris_lightning.core.trajectory import PromptGroup


def can_take(buffer: CarryOverBuffer, bound: int | None) -> bool:
    """Sorts all groups: the i-th left behind (from 0) must keep until V + 1 + i // B."""
    groups = {t.group_id: buffer.group(t.group_id) for t in buffer.trajectories()}
    ready = {group_id for group_id, _ in buffer.keys(Status.READY)}
    urgent = sorted(ready, key=lambda group_id: (groups[group_id].first_version, group_id))
    if len(urgent) < buffer.batch_groups:
        return False
    if bound is None:
        return True
    leaving = urgent[: buffer.batch_groups]
    deadlines = sorted(
        group.first_version + bound
        for group_id, group in groups.items()
        if group.first_version is not None and group_id not in leaving
    )
    return all(
        deadline >= buffer.version + 1 + i // buffer.batch_groups
        for i, deadline in enumerate(deadlines)
    )


VERBS = ("fill", "fill", "complete", "complete", "evict", "take", "take", "advance", "save")


@settings(max_examples=200, deadline=None)
@given(
    bound=st.sampled_from([None, 0, 1, 2, 3, 5]),
    batch_groups=st.integers(1, 4),
    group_size=st.integers(1, 2),
    history=st.lists(
        st.tuples(st.sampled_from(VERBS), st.integers(0, 99)), min_size=20, max_size=60
    ),
)
def test_it_agrees_with_sorted_deadlines_over_any_history(
    bound: int | None, batch_groups: int, group_size: int, history: list[tuple[str, int]]
) -> None:
    def empty() -> CarryOverBuffer:
        return CarryOverBuffer(
            limit=20,
            group_size=group_size,
            batch_groups=batch_groups,
            max_new_tokens=4,
            max_staleness=bound,
        )

    buffer = empty()
    for verb, number in history:
        flying = buffer.keys(Status.IN_FLIGHT)
        ready = buffer.keys(Status.READY)
        if verb == "fill":
            for _ in range(number % 10):
                if buffer.may_admit():
                    buffer.admit("p", 0, [1])
                buffer.next()
        elif verb == "complete":
            for key in flying[number % 3 :][: number % 10]:
                buffer.finish(key, "stop")
                buffer.score(key, 1.0)
        elif verb == "evict" and ready:
            buffer.evict(ready[number % len(ready)][0])
        elif verb == "take" and buffer.can_take() and are_young(buffer, bound):
            buffer.take()
        elif verb == "advance":  # with no batch taken in between, too
            buffer.advance(buffer.version + 1 + number // 80)
        elif verb == "save" and is_loadable(buffer, bound):
            state, buffer = buffer.state_dict(), empty()
            buffer.load_state_dict(state)
        assert buffer.can_take() == can_take(buffer, bound)


def are_young(buffer: CarryOverBuffer, bound: int | None) -> bool:
    """Not so after histories that no trainer would write."""
    firsts = (buffer.group(t.group_id).first_version for t in buffer.trajectories())
    oldest = min((first for first in firsts if first is not None), default=buffer.version)
    return bound is None or buffer.version - oldest <= bound


def is_loadable(buffer: CarryOverBuffer, bound: int | None) -> bool:
    groups = {t.group_id: buffer.group(t.group_id).first_version for t in buffer.trajectories()}
    firsts = (buffer.version if first is None else first for first in groups.values())
    leaving = buffer.version + bool(buffer.count(Status.TAKEN))
    return bound is None or needed_staleness(firsts, leaving, buffer.batch_groups) <= bound


def started(group_id: int, first_version: int | None) -> PromptGroup:
    return PromptGroup(group_id, 0, [], first_version)


def test_the_most_urgent_leave_first_and_dropped_ones_never() -> None:
    freshness = Freshness(max_staleness=3)
    groups = [started(i, first) for i, first in enumerate([2, 1, 1, 0, 2])]
    for group in groups:
        freshness.start(group)
    for group in reversed(groups):
        freshness.complete(group)
    freshness.drop(groups[1])
    assert freshness.take(2, 3) == [3, 2, 0]
    assert freshness.take(2, 1) == [4]
    assert not freshness.can_take(2, 1)


def test_of_those_left_behind_j_batches_may_be_due_in_j_versions() -> None:
    # K = 2, B = 1, V = 2: of deadlines 2, 3, 4 and 5 none, 1, 2 and 2 may stay behind.
    for firsts, expected in (
        ([0], False),
        ([1], True),
        ([1, 1], False),
        ([1, 2], True),
        ([2, 2], True),
        ([2, 2, 2], False),
    ):
        freshness = Freshness(max_staleness=2)
        leaving = started(9, 0)
        for group in [leaving, *(started(i, first) for i, first in enumerate(firsts))]:
            freshness.start(group)
        freshness.complete(leaving)
        assert freshness.can_take(2, 1) is expected, firsts


def test_a_group_past_its_deadline_cannot_be_taken() -> None:
    freshness = Freshness(max_staleness=1)
    late = started(0, 0)
    freshness.start(late)
    freshness.complete(late)
    with pytest.raises(AssertionError, match="staleness bound broken: group 0 is of version 0"):
        freshness.take(2, 1)


def test_a_group_that_was_never_started_has_no_age() -> None:
    with pytest.raises(AssertionError, match="group 3 was never started"):
        Freshness(None).start(started(3, None))


def test_the_staleness_that_groups_need() -> None:
    assert needed_staleness([], 5, 2) == 0
    assert needed_staleness([5, 5], 5, 2) == 0
    assert needed_staleness([5, 5, 5], 5, 2) == 1
    assert needed_staleness([5, 3, 4], 5, 1) == 2
