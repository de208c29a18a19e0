"""What must hold of a run's cycles, whatever the lengths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.timing.costs import Costs
from copris_lightning.core.timing.cycles import Cycles, Flow, Sizes
from copris_lightning.core.timing.lengths import Draws, LogNormal
from copris_lightning.errors import ConfigurationError

GROUPS, SIZE, LIMIT, PROMPT = 3, 2, 400, 5
SIZES = Sizes(GROUPS, SIZE, LIMIT, PROMPT)
COSTS = Costs(step_s=0.02, slot_s=1e-4, kv_s=1e-7, prefix_s=1e-4, train_s=1e-3, sync_s=0.5)
FREE = Costs(step_s=0.02)
"""A place in flight costs nothing, and nor does being carried over."""

SYNC = Flow(max_staleness=0)
FLOWS = {
    "sync": SYNC,
    "staged fresh": Flow(),
    "staged kept": Flow(keeps=True),
    "streaming fresh": Flow(streams=True, max_staleness=2),
    "streaming kept": Flow(streams=True, keeps=True, max_staleness=2),
}
every_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)


def draws(seed: int, sigma: float = 1.2) -> Draws:
    return Draws(LogNormal(40.0, sigma), SIZE, seed)


def run(flow: Flow, cap: int, seed: int = 0, costs: Costs = COSTS) -> Cycles:
    return Cycles(draws(seed), SIZES, costs, flow, cap)


@every_flow
@settings(deadline=None, max_examples=25)
@given(cap=st.integers(1, 20), seed=st.integers(0, 1000))
def test_in_flight_is_never_more_than_the_cap(flow: Flow, cap: int, seed: int) -> None:
    most = 0

    class Watched(Draws):
        def group(self, index: int, limit: int) -> list[int]:
            nonlocal most
            most = max(most, cycles.decoding.in_flight)
            return super().group(index, limit)

    cycles = Cycles(Watched(LogNormal(40.0, 1.2), SIZE, seed), SIZES, COSTS, flow, cap)
    for _ in range(6):
        cycles.cycle()
        most = max(most, cycles.decoding.in_flight)
        assert cycles.decoding.in_flight == cycles.buffer.in_flight
    mean = cycles.mean(4, 0)
    assert most <= cap
    assert mean.in_flight <= cap + 1e-9
    if flow.max_staleness is not None:
        assert mean.lag_max <= flow.max_staleness


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_synchronous_batch_takes_as_long_as_its_longest_response(seed: int) -> None:
    cycles = run(SYNC, GROUPS * SIZE, seed, FREE)
    seen = draws(seed)
    for batch in range(5):
        groups = [seen.group(GROUPS * batch + i, LIMIT) for i in range(GROUPS)]
        assert cycles.cycle() == pytest.approx(0.02 * max(map(max, groups)))


@pytest.mark.parametrize("flow", [SYNC, Flow(), Flow(keeps=True)])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000))
def test_with_free_places_more_of_them_never_take_longer(flow: Flow, seed: int) -> None:
    ends = []
    for cap in (1, 2, 3, 5, 8, 13, 21):
        cycles = run(flow, cap, seed, FREE)
        for _ in range(8):
            cycles.cycle()
        ends.append(cycles.decoding.now)
    assert all(more <= fewer + 1e-9 for fewer, more in pairwise(ends))


@pytest.mark.parametrize("flow", [SYNC, Flow(), Flow(keeps=True), Flow(max_staleness=1)])
@settings(deadline=None, max_examples=25)
@given(cap=st.integers(1, 20), seed=st.integers(0, 1000))
def test_where_trainer_and_engine_take_turns_the_time_is_that_of_the_work(
    flow: Flow, cap: int, seed: int
) -> None:
    mean = run(flow, cap, seed).mean(6, 3)
    assert mean.seconds == pytest.approx(mean.work.seconds(COSTS))
    assert mean.work.batches == 1
    # What there is to do is the same whatever it costs.
    assert mean.work == pytest.approx(run(flow, cap, seed, FREE).mean(6, 3).work)


def test_keeping_saves_the_prefixes_and_nothing_else() -> None:
    fresh, kept = (run(flow, 16).mean(40, 10) for flow in (Flow(), Flow(keeps=True)))
    assert kept.work._replace(prefix=0) == fresh.work._replace(prefix=0)
    saved = (fresh.work.prefix - kept.work.prefix) * COSTS.prefix_s
    assert 0 < saved == pytest.approx(fresh.seconds - kept.seconds)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.0, 3.0])
def test_streaming_takes_as_long_as_the_longer_half(keeps: bool, share: float) -> None:
    def mean(costs: Costs, **flow: Any) -> float:
        sizes, cap = Sizes(16, 4, LIMIT), 64
        drawn = Draws(LogNormal(40.0, 0.5), 4)
        return Cycles(drawn, sizes, costs, Flow(keeps=keeps, **flow), cap).mean(30, 10).seconds

    rolling = mean(FREE)
    costs = Costs(step_s=0.02, batch_s=share * rolling)
    assert mean(costs) == pytest.approx((1 + share) * rolling)
    streaming = mean(costs, streams=True, max_staleness=4)
    assert streaming == pytest.approx(max(1, share) * rolling, rel=0.05)


@pytest.mark.parametrize("keeps", [False, True])
@settings(deadline=None, max_examples=25)
@given(cap=st.integers(1, 20), seed=st.integers(0, 1000))
def test_streaming_beside_training_that_takes_no_time_is_staged(
    keeps: bool, cap: int, seed: int
) -> None:
    sizes, costs = Sizes(GROUPS, SIZE, LIMIT), Costs(step_s=0.02, prefix_s=1e-3, sync_s=0.5)
    staged, streaming = (
        Cycles(draws(seed), sizes, costs, Flow(streams, keeps), cap) for streams in (False, True)
    )
    for _ in range(8):
        staged.cycle()
        streaming.cycle()
        assert streaming.buffer.version == staged.buffer.version
    # Those that stream have their prefixes sent again by the end of the cycle, not at the next.
    left = (streaming.decoding.work.prefix - staged.decoding.work.prefix) * costs.prefix_s
    assert streaming.decoding.now - left == pytest.approx(staged.decoding.now)
    assert left == 0 if keeps else left >= 0


def test_four_cycles_by_hand() -> None:
    class Given:
        def draw(self, random: Random, count: int) -> Sequence[float]:
            return [next(them)]

    # One place beyond the batch: 4 ends at step 4, 3 at step 7, 10 at step 10, 9 at step 16.
    them = iter([4, 10, 3, 9, 1000, 1000])
    cycles = Cycles(Draws(Given(), 1), Sizes(1, 1, 2000), Costs(step_s=1.0), Flow(), 2)
    assert [cycles.cycle() for _ in range(4)] == [4, 3, 3, 6]
    # Carried over were 10 with 4 made, then with 7, and 9 with 3.
    assert cycles.decoding.work.prefix == 4 + 7 + 3


@pytest.mark.parametrize("name", ["groups", "group_size", "limit", "prompt"])
def test_sizes_that_cannot_be_are_refused(name: str) -> None:
    sizes = {"groups": 1, "group_size": 1, "limit": 1}
    with pytest.raises(ConfigurationError, match=f"{name}=-1 must be at least"):
        Sizes(**{**sizes, name: -1})
    with pytest.raises(ConfigurationError, match="cap=0 must be at least 1"):
        Cycles(draws(0), SIZES, COSTS, SYNC, 0)
