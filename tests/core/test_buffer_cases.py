"""Single cases of the buffer: the docstring's example, order of starts, errors, saved states."""

import copy
import io

import pytest
import torch
from trajectories import plain, versions

from copris_lightning.core.buffer import CarryOverBuffer, Status

STOP = 0


def make(**changes):
    sizes = {"limit": 2, "group_size": 1, "batch_groups": 1, "max_new_tokens": 4}
    return CarryOverBuffer(**{**sizes, "stop_token_ids": [STOP], **changes})


def admit(buffer, count):
    for i in range(count):
        buffer.admit(f"p{i}", i, [5, 6])


def start(buffer):
    trajectory = buffer.next()
    return trajectory and (trajectory.group_id, trajectory.sample)


def complete(buffer, key):
    buffer.append(key, [STOP], [-0.5], buffer.version)
    buffer.score(key, 1.0)


def test_the_example_of_the_docstring_holds():
    buffer = make()
    admit(buffer, 3)
    a, b, c = buffer.keys(Status.WAITING)
    assert [start(buffer), start(buffer), start(buffer)] == [a, b, None]
    buffer.append(a, [3, STOP], [-1.0, -1.0], 0)
    assert buffer.keys(Status.FINISHED) == [a]
    assert start(buffer) == c
    assert not buffer.can_take()
    assert buffer.score(a, 1.0)
    assert buffer.can_take()
    assert buffer.carry_over() == [b, c]
    (group,) = buffer.take()
    assert [v.reward for v in group.verdicts] == [1.0]
    buffer.advance(1)
    assert [start(buffer), start(buffer)] == [b, c]


def test_carried_over_is_resumed_oldest_first_before_anything_waiting():
    buffer = make(limit=3)
    admit(buffer, 3)
    for _ in range(3):
        start(buffer)
    complete(buffer, (1, 0))
    buffer.carry_over()
    # A fresh prompt, and one that is carried over twice.
    buffer.admit("late", 9, [5])
    assert start(buffer) == (0, 0)
    buffer.carry_over()
    assert [start(buffer), start(buffer), start(buffer)] == [(0, 0), (2, 0), (3, 0)]


def test_a_resumed_trajectory_keeps_its_prefix_and_the_limit_spans_resumes():
    buffer = make()
    admit(buffer, 1)
    key = start(buffer)
    buffer.append(key, [3, 4], [-0.1, -0.2], 0)
    buffer.carry_over()
    buffer.advance(1)
    trajectory = buffer.next()
    assert (trajectory.tokens.tolist(), trajectory.remaining_tokens) == ([3, 4], 2)
    buffer.append(key, [5, 6], [-0.3, -0.4], 1)
    assert trajectory.finish_reason == "length"
    assert versions(trajectory) == [0, 0, 1, 1]
    assert buffer.status(key) is Status.FINISHED


def test_a_stop_token_as_the_last_that_fits_is_a_stop():
    buffer = make(max_new_tokens=2)
    admit(buffer, 1)
    key = start(buffer)
    buffer.append(key, [3, STOP], [-1.0, -1.0], 0)
    assert buffer.trajectory(key).finish_reason == "stop"


def test_a_finished_trajectory_is_never_carried_over_or_started_again():
    buffer = make()
    admit(buffer, 1)
    key = start(buffer)
    buffer.finish(key, "stop")
    assert buffer.carry_over() == []
    assert buffer.next() is None


def test_a_group_is_ready_only_with_its_last_sibling():
    buffer = make(limit=2, group_size=2)
    admit(buffer, 1)
    start(buffer), start(buffer)
    complete(buffer, (0, 1))
    assert (buffer.ready_groups, buffer.keys(Status.SCORED)) == (0, [(0, 1)])
    with pytest.raises(ValueError, match="0 groups are ready, a batch takes 1"):
        buffer.take()
    complete(buffer, (0, 0))
    assert buffer.ready_groups == 1


def test_taken_and_evicted_groups_are_gone():
    buffer = make()
    admit(buffer, 2)
    for key in (start(buffer), start(buffer)):
        complete(buffer, key)
    assert buffer.evict(1).group_id == 1
    assert [group.group_id for group in buffer.take()] == [0]
    assert list(buffer.trajectories()) == []
    for key in ((0, 0), (1, 0)):
        with pytest.raises(KeyError):
            buffer.trajectory(key)
    assert (buffer.count(Status.TAKEN), buffer.count(Status.EVICTED)) == (1, 1)
    buffer.advance(1)
    assert (buffer.count(Status.DELIVERED), buffer.count(Status.EVICTED)) == (1, 1)


def test_a_stage_is_held_while_those_left_behind_would_be_late():
    # K = 1, B = 1: of two groups started at version 0 one must leave at 0 and one at 1.
    buffer = make(limit=3, max_staleness=1)
    admit(buffer, 2)
    assert not buffer.may_admit()
    start(buffer), start(buffer)
    complete(buffer, (1, 0))
    assert buffer.can_take()
    buffer.carry_over()
    buffer.take()
    buffer.advance(1)
    # Group 0 is due now: younger ready work must not leave without it.
    buffer.admit("young", 2, [5])
    start(buffer), start(buffer)
    complete(buffer, (2, 0))
    assert not buffer.can_take()
    complete(buffer, (0, 0))
    assert buffer.can_take()
    assert [group.group_id for group in buffer.take()] == [0]


def test_without_carry_over_a_stage_waits_for_all_it_started():
    buffer = make(limit=4, batch_groups=2, max_staleness=0)
    admit(buffer, 2)
    assert not buffer.may_admit()
    start(buffer), start(buffer)
    complete(buffer, (0, 0))
    assert not buffer.can_take()
    complete(buffer, (1, 0))
    assert buffer.can_take()


def test_responses_without_a_token_are_taken_under_a_bound():
    buffer = make(max_staleness=0)
    admit(buffer, 1)
    key = start(buffer)
    buffer.finish(key, "stop")
    buffer.score(key, 0.0)
    assert [group.group_id for group in buffer.take()] == [0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", 0),
        ("group_size", 0),
        ("batch_groups", 0),
        ("max_new_tokens", 0),
        ("max_staleness", -1),
    ],
)
def test_a_size_below_its_minimum_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make(**{name: value})


def test_versions_only_rise():
    buffer = make()
    buffer.advance(0)
    buffer.advance(3)
    with pytest.raises(ValueError, match="version 2 follows version 3"):
        buffer.advance(2)


def test_weights_may_change_under_what_is_in_flight():
    buffer = make()
    admit(buffer, 1)
    key = start(buffer)
    buffer.append(key, [3], [-0.1], 0)
    buffer.advance(1)
    assert buffer.in_flight == 1
    # A chunk that was on its way when they changed, and one made since.
    buffer.append(key, [4], [-0.2], 0)
    buffer.append(key, [5], [-0.3], 1)
    assert versions(buffer.trajectory(key)) == [0, 0, 1]


def test_a_token_older_than_its_group_is_refused():
    buffer = make()
    buffer.advance(4)
    admit(buffer, 1)
    key = start(buffer)
    with pytest.raises(ValueError, match="version 3, older than its group"):
        buffer.append(key, [3], [-0.1], 3)


def test_a_limit_below_what_is_in_flight_starts_nothing_until_it_has_fallen():
    buffer = make(limit=3)
    admit(buffer, 5)
    for _ in range(3):
        start(buffer)
    buffer.limit = 2
    buffer.finish((0, 0), "stop")
    assert (buffer.in_flight, start(buffer)) == (2, None)
    buffer.finish((1, 0), "stop")
    assert (buffer.in_flight, start(buffer)) == (1, (3, 0))
    buffer.limit = 4
    assert [start(buffer), start(buffer)] == [(4, 0), None]


def test_a_place_that_was_yielded_goes_to_the_oldest_carried_over():
    buffer = make(limit=2)
    admit(buffer, 3)
    start(buffer), start(buffer)
    buffer.append((1, 0), [3], [-0.1], 0)
    buffer.yield_place((1, 0))
    assert buffer.keys(Status.CARRIED_OVER) == [(1, 0)]
    buffer.yield_place((0, 0))
    assert [start(buffer), start(buffer), start(buffer)] == [(0, 0), (1, 0), None]
    assert buffer.trajectory((1, 0)).tokens.tolist() == [3]


def one_taken(**changes):
    """K = 1, B = 1: group 0 is taken at version 0, group 1 is in flight."""
    buffer = make(max_staleness=1, **changes)
    admit(buffer, 2)
    complete(buffer, start(buffer))
    start(buffer)
    buffer.take()
    return buffer


def test_a_taken_group_keeps_its_place_until_the_version_rises():
    buffer = one_taken()
    assert buffer.keys(Status.TAKEN) == [(0, 0)]
    assert not buffer.may_admit()
    buffer.advance(0)
    assert not buffer.may_admit()
    buffer.advance(1)
    assert buffer.may_admit()
    assert (buffer.count(Status.TAKEN), buffer.count(Status.DELIVERED)) == (0, 1)


def test_without_a_rise_a_taken_group_keeps_its_place_until_the_next_take():
    buffer = one_taken()
    complete(buffer, (1, 0))
    assert [group.group_id for group in buffer.take()] == [1]
    assert (buffer.keys(Status.TAKEN), buffer.count(Status.DELIVERED)) == ([(1, 0)], 1)
    assert buffer.may_admit()
    buffer.settle()
    assert (buffer.count(Status.TAKEN), buffer.count(Status.DELIVERED)) == (0, 2)


def test_an_evicted_group_frees_its_place_at_once():
    buffer = make(max_staleness=0)
    admit(buffer, 1)
    complete(buffer, start(buffer))
    assert not buffer.may_admit()
    buffer.evict(0)
    assert buffer.may_admit()


def test_what_is_taken_is_saved_and_stays_taken():
    loaded = make(max_staleness=1)
    loaded.load_state_dict(one_taken().state_dict())
    assert loaded.keys(Status.TAKEN) == [(0, 0)]
    assert [t.group_id for t in loaded.trajectories()] == [1]
    assert not loaded.may_admit()
    loaded.advance(1)
    assert loaded.count(Status.DELIVERED) == 1
    assert loaded.admit("fresh", 2, [5]) == 2


def test_what_is_left_while_a_batch_is_out_can_leave_at_the_next_version_at_the_earliest():
    state = one_taken().state_dict()
    with pytest.raises(ValueError, match="max_staleness=0 to at least 1"):
        make(max_staleness=0).load_state_dict(state)


def test_transitions_that_the_table_does_not_have_are_refused():
    buffer = make()
    admit(buffer, 1)
    for call in (
        lambda: buffer.append((0, 0), [3], [-1.0], 0),
        lambda: buffer.finish((0, 0), "stop"),
        lambda: buffer.score((0, 0), 1.0),
        lambda: buffer.evict(0),
    ):
        with pytest.raises(AssertionError):
            call()
    complete(buffer, start(buffer))
    with pytest.raises(AssertionError):
        buffer.score((0, 0), 1.0)
    assert buffer.trajectory((0, 0)).reward == 1.0


def some_state():
    buffer = make(limit=3, group_size=2)
    admit(buffer, 3)
    for _ in range(3):
        start(buffer)
    buffer.append((0, 0), [3, 4], [-0.1, -0.2], 0)
    complete(buffer, (0, 1))
    return buffer


def test_a_state_loads_with_the_safe_default_of_torch():
    state, file = some_state().state_dict(), io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert plain(torch.load(file, weights_only=True)) == plain(state)


def test_a_saved_state_shares_nothing_with_the_buffers():
    buffer = some_state()
    state = buffer.state_dict()
    before = copy.deepcopy(state)
    buffer.append((0, 0), [5], [-0.3], 0)
    loaded = make(limit=3, group_size=2)
    loaded.load_state_dict(state)
    assert start(loaded) == (0, 0)
    loaded.append((0, 0), [6], [-0.4], 0)
    assert plain(state) == plain(before)


def test_a_group_that_was_saved_half_scored_is_ready_with_its_last_sibling():
    loaded = make(limit=3, group_size=2)
    loaded.load_state_dict(some_state().state_dict())
    assert (loaded.keys(Status.SCORED), loaded.ready_groups) == ([(0, 1)], 0)
    complete(loaded, start(loaded))
    assert loaded.ready_groups == 1
    again = make(limit=3, group_size=2)
    again.load_state_dict(loaded.state_dict())
    assert [group.group_id for group in again.take()] == [0]


def test_loading_replaces_what_was_there():
    buffer = some_state()
    state = buffer.state_dict()
    buffer.admit("later", 9, [5])
    start(buffer)
    buffer.load_state_dict(state)
    assert plain(buffer.state_dict()) == plain(state)
    assert buffer.keys(Status.CARRIED_OVER) == [(0, 0), (1, 0)]
    assert buffer.in_flight == 0


def test_limit_and_batch_size_may_change_on_loading():
    loaded = make(limit=1, group_size=2, batch_groups=3)
    loaded.load_state_dict(some_state().state_dict())
    assert [start(loaded), start(loaded)] == [(0, 0), None]


@pytest.mark.parametrize("change", [{"group_size": 3}, {"max_new_tokens": 5}])
def test_a_state_of_other_sizes_is_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make(**{"group_size": 2, **change}).load_state_dict(some_state().state_dict())


def test_a_state_that_a_smaller_bound_cannot_keep_is_refused_on_loading():
    buffer = make(max_staleness=1)
    admit(buffer, 2)
    start(buffer), start(buffer)
    complete(buffer, (0, 0))
    buffer.carry_over()
    buffer.take()
    buffer.advance(1)
    for bound in (1, 2, None):
        make(max_staleness=bound).load_state_dict(buffer.state_dict())
    with pytest.raises(ValueError, match="max_staleness"):
        make(max_staleness=0).load_state_dict(buffer.state_dict())


def test_more_waiting_groups_than_a_bound_can_take_are_refused_on_loading():
    buffer = make()
    admit(buffer, 4)
    make(max_staleness=3).load_state_dict(buffer.state_dict())
    make(max_staleness=1, batch_groups=2).load_state_dict(buffer.state_dict())
    for changes in ({"max_staleness": 2}, {"max_staleness": 0, "batch_groups": 3}):
        with pytest.raises(ValueError, match="max_staleness"):
            make(**changes).load_state_dict(buffer.state_dict())
