"""From load to limit: a pure function, whatever the load."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.cap import TARGET, Cap, Load
from copris_lightning.errors import ConfigurationError

counts = st.integers(0, 4096)
shares = st.floats(0, 1)
loads = st.none() | st.builds(Load, counts, counts, st.none() | shares, counts)
caps = st.tuples(st.integers(1, 4096), st.integers(1, 4096)).map(lambda two: Cap(*sorted(two)))


@settings(deadline=None)
@given(cap=caps, load=loads, start=st.floats(0, 5000), preempted=counts, is_full=st.booleans())
def test_the_limit_is_within_the_bounds_and_moves_by_one_place_at_most(
    cap: Cap, load: Load | None, start: float, preempted: int, is_full: bool
) -> None:
    limit = cap.clip(start)
    then = cap(load, limit, preempted=preempted, is_full=is_full)
    assert cap.least <= then <= cap.most
    assert abs(then - limit) <= 1
    assert then == cap(load, limit, preempted=preempted, is_full=is_full)


@settings(deadline=None)
@given(cap=caps, load=loads.filter(bool), start=st.floats(0, 5000), preempted=counts, more=counts)
def test_the_fuller_the_engine_the_lower_the_limit(
    cap: Cap, load: Load, start: float, preempted: int, more: int
) -> None:
    limit = cap.clip(start)
    now = cap(load, limit, preempted=preempted)
    assert cap(load, limit, preempted=preempted + more) <= now
    assert cap(replace(load, waiting=load.waiting + more), limit, preempted=preempted) <= now
    if load.kv_usage is not None:
        fuller = replace(load, kv_usage=min(1.0, load.kv_usage + more / 4096))
        assert cap(fuller, limit, preempted=preempted) <= now


@settings(deadline=None)
@given(places=st.integers(1, 4096), load=loads, preempted=counts)
def test_equal_bounds_are_the_fixed_cap(places: int, load: Load | None, preempted: int) -> None:
    cap = Cap(places, places)
    assert cap.is_fixed
    assert cap(load, cap.clip(0), preempted=preempted) == places


@pytest.mark.parametrize("start", [1, 20, 200])
@pytest.mark.parametrize("size", [0.01, 0.07])
def test_it_comes_to_rest_where_the_cache_is_as_full_as_it_should_be(
    size: float, start: float
) -> None:
    """All trajectories take the same share of the cache: no swing, from either side."""
    cap, limit = Cap(1, 500), float(start)
    fits, way = TARGET / size, []
    for _ in range(6000):
        running = min(int(limit), int(1 / size))
        load = Load(running, int(limit) - running, running * size)
        way.append(abs(fits - limit))
        limit = cap(load, limit)
    assert limit == pytest.approx(fits, rel=0.02)
    assert all(after <= before for before, after in pairwise(way))


def test_it_grows_only_while_all_places_are_taken_and_none_waits() -> None:
    cap, load = Cap(1, 100), Load(20, 0, 0.02)
    assert cap(load, 21.0) == 22.0
    assert cap(load, 21.0, is_full=False) == 21.0
    assert cap(replace(load, waiting=1), 21.0) == 21.0
    assert cap(replace(load, kv_usage=1.0), 21.0, is_full=False) < 21.0


def test_an_engine_that_does_not_tell_leaves_the_limit_alone() -> None:
    for load in (None, Load(20, 0), Load(0, 0, 1.0)):
        assert Cap(1, 100)(load, 20.5) == 20.5


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ((0, 4), r"^least=0 must be a whole number from 1 on"),
        ((2, 2.5), r"^most=2\.5 must be"),
        ((True, 4), r"^least=True must be"),
        ((9, 4), r"^least=9 must be at most most=4"),
    ],
    ids=str,
)
def test_bounds_that_cannot_be_are_refused(bounds: tuple[int, int], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Cap(*bounds)
