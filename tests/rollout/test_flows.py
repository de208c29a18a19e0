"""The four flows: staged or streaming, with keys and values fresh or kept."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trajectories import plain

from copris_lightning.engines.simulated_tokens import Faults
from copris_lightning.errors import EngineError

FLOWS = {
    "staged, fresh": {"streams": False, "keeps": False},
    "staged, kept": {"streams": False, "keeps": True},
    "streaming, fresh": {"streams": True, "keeps": False},
    "streaming, kept": {"streams": True, "keeps": True},
}
SMALL = {"cap": 8, "batch_groups": 2, "group_size": 2, "median": 10.0, "max_new_tokens": 60}
ODD = Faults(empty_chunk_rate=0.2, late_finish_rate=0.5)

every_flow = pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)


def segments(run: Any) -> list[Any]:
    return [s for g in run.groups for t in g.trajectories for s in t.segments]


def check(run: Any, max_staleness: int, others: int = 0) -> None:
    """Every token is the one that its labels say, each is somewhere, and none is too old.

    Args:
        others: tokens that somebody else got from the engine.
    """
    run.end_streams()
    run.check_all_tokens()
    run.check_conservation()
    balance = run.scheduler.figures.balance()
    assert balance.missing == 0
    assert balance.generated == run.engine.tokens_made - others
    assert balance.delivered == sum(t.response_length for g in run.groups for t in g.trajectories)
    assert max(event.in_flight for event in run.events) <= run.buffer.limit
    for version, group in enumerate(run.groups):
        for trajectory in group.trajectories:
            oldest = min(s.version for s in trajectory.segments)
            assert version // run.buffer.batch_groups - oldest <= max_staleness


@every_flow
@pytest.mark.parametrize("interval", [1, 8])
@pytest.mark.parametrize("training_s", [0.0, 0.2, 5.0])
def test_a_flow_loses_mislabels_and_delays_nothing(rollout, flow, interval, training_s):
    run = rollout(
        **{**SMALL, **flow},
        stream_interval=interval,
        training_s=training_s,
        max_staleness=2,
        sigma=1.5,
        faults=ODD,
    )
    run.stages(20)
    check(run, 2)
    found = segments(run)
    assert any(s.version > 2 for s in found)
    if training_s < 1 or not flow["streams"]:  # else all that may be begun ends meanwhile
        assert any(len(t.segments) > 1 for g in run.groups for t in g.trajectories)
        assert any(s.kv_version < s.version for s in found) == flow["keeps"]
        assert bool(run.of_kind("resume")) != flow["keeps"]


@every_flow
def test_figures_of_a_run_whose_weights_come_before_its_first_batch(rollout, flow):
    run = rollout(**{**SMALL, **flow}, training_s=0.3, max_staleness=2, sigma=1.5)
    run.run(asyncio.sleep(1000.0))
    run.sync()
    begun = run.loop.time()
    taken = []
    for _ in range(8):
        _, stats = run.collect()
        taken.append(stats)
        last = run.loop.time()
        begun_here = [t for t in run.buffer.trajectories() if t.response_length]
        unfinished = sum(t.finish_reason is None for t in begun_here)
        assert unfinished <= stats.carried_over <= run.buffer.limit
        assert stats.balance.missing == stats.balance.restored == 0
        run.sync()
    if flow["streams"]:
        assert sum(stats.seconds for stats in taken) == pytest.approx(last - begun)
    assert sum(stats.seconds for stats in taken) <= last - begun
    assert any(stats.carried_over for stats in taken)
    check(run, 2)


@every_flow
def test_a_run_is_the_same_each_time(rollout, flow):
    runs = [rollout(**{**SMALL, **flow}, training_s=0.3, max_staleness=1) for _ in range(2)]
    for run in runs:
        run.stages(12)
    assert runs[0].events == runs[1].events
    assert runs[0].groups == runs[1].groups


def cycle_s(rollout: Any, **config: Any) -> float:
    """Virtual seconds of a cycle, in the long run."""
    run = rollout(cap=64, batch_groups=16, group_size=4, median=20.0, sigma=0.5, **config)
    run.stages(5)
    begun = run.loop.time()
    run.stages(15)
    return (run.loop.time() - begun) / 15


@pytest.mark.parametrize("keeps", [False, True])
def test_streaming_takes_as_long_as_the_longer_half(rollout, keeps):
    rolling = cycle_s(rollout, keeps=keeps)
    bound = {"keeps": keeps, "max_staleness": 4}
    for training_s in (0.3 * rolling, rolling, 3 * rolling):
        staged = cycle_s(rollout, training_s=training_s, **bound)
        streaming = cycle_s(rollout, training_s=training_s, streams=True, **bound)
        assert staged == pytest.approx(rolling + training_s, rel=0.05)
        assert streaming == pytest.approx(max(rolling, training_s), rel=0.05)
        if training_s == rolling:
            assert staged / streaming > 1.6


@every_flow
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_generation_never_runs_further_ahead_than_the_bound(rollout, flow, bound):
    run = rollout(**{**SMALL, **flow}, training_s=100.0, max_staleness=bound, sigma=1.5)
    for _ in range(12):
        run.collect()
        run.sync()
        begun = run.buffer.admitted // run.buffer.group_size - len(run.groups)
        assert begun <= (bound + 1) * run.buffer.batch_groups
    check(run, bound)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    indices=st.sets(st.integers(0, 250), max_size=40),
    streams=st.booleans(),
    interval=st.sampled_from([1, 3, 8]),
    cap=st.integers(1, 9),
    ticks=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_labels_under_fire_with_keys_and_values_kept(
    rollout, indices, streams, interval, cap, ticks, seed
):
    config = {**SMALL, "cap": cap, "keeps": True, "streams": streams, "training_s": 0.05}
    run = rollout(**config, faults=ODD, stream_interval=interval, seed=seed, max_staleness=None)
    swaps: list[asyncio.Task[None]] = []

    async def swap() -> None:
        for _ in range(ticks):
            await asyncio.sleep(0)
        await run.swap(run.shared.version + 1)

    def look(event: Any) -> None:
        if len(run.events) - 1 in indices and (not swaps or swaps[-1].done()):
            swaps.append(run.loop.create_task(swap()))

    run.watchers.append(look)
    for _ in range(6):
        run.collect()

    async def all_of() -> None:
        await asyncio.gather(*swaps)

    run.run(all_of())
    run.end_streams()
    run.check_all_tokens()
    run.check_conservation()
    assert run.scheduler.figures.balance().missing == 0
    assert run.scheduler.figures.balance().generated == run.engine.tokens_made
    run.close()


@every_flow
def test_a_saved_run_goes_on_as_the_one_that_saved(rollout, flow):
    config = {**SMALL, **flow, "training_s": 0.3, "max_staleness": 2, "sigma": 1.5}
    run = rollout(**config)
    run.stages(5)
    run.collect()
    state = run.run(run.scheduler.snapshot())
    heir = rollout(**config)
    heir.buffer.load_state_dict(state["buffer"])
    heir.prompts.load_state_dict(state["prompts"])
    heir.sync(run.shared.version)
    run.groups.clear()
    for one in (run, heir):
        one.sync()
        one.stages(8)
        one.end_streams()
        one.check_all_tokens()
    assert run.groups == heir.groups
    assert plain(run.buffer.state_dict()) == plain(heir.buffer.state_dict())


@every_flow
def test_an_evaluation_has_the_engine_to_itself_and_training_goes_on_after_it(rollout, flow):
    run = rollout(**{**SMALL, **flow}, training_s=0.3, max_staleness=2)
    run.stages(3)
    other = rollout(**SMALL, shared=run.shared, loop=run.loop, name="val", seed=9, is_alone=True)
    before = len(run.events)
    other.collect()
    other.collect()
    quiet = {event.kind for event in run.events[before:]}
    assert quiet <= {"chunk", "finish", "score", "carry_over"}
    assert run.buffer.in_flight == 0
    assert max(event.in_flight for event in other.events) == other.buffer.limit
    run.run(other.scheduler.close())
    assert (run.buffer.in_flight > 0) == flow["streams"]
    run.stages(3)
    check(run, 2, other.scheduler.figures.balance().generated)


@every_flow
def test_a_take_that_is_stopped_leaves_all_tokens_in_the_buffer(rollout, flow):
    run = rollout(
        **{**SMALL, **flow, "batch_groups": 6}, stream_interval=8, training_s=0.01, max_staleness=2
    )
    run.stages(2)

    async def stopped() -> None:
        take = asyncio.create_task(run.scheduler.take())
        begun = len(run.events)
        run.watchers.append(lambda event: len(run.events) - begun == 20 and take.cancel())
        await asyncio.wait([take])
        assert take.cancelled()

    run.run(stopped())
    run.watchers.clear()
    assert run.buffer.in_flight == 0
    assert run.scheduler.figures.balance().generated == run.engine.tokens_made
    run.stages(3)
    check(run, 2)


@every_flow
def test_what_an_engine_made_is_saved_if_it_dies_during_training(rollout, flow):
    run = rollout(**{**SMALL, **flow}, training_s=0.3, max_staleness=2)
    run.sync()
    run.stages(3)
    run.collect()
    run.engine.kill()
    state = run.run(run.scheduler.snapshot())
    assert run.buffer.in_flight == 0
    assert run.scheduler.figures.balance().generated == run.engine.tokens_made
    saved, version = run.scheduler.figures.balance().carried, run.shared.version
    with pytest.raises(EngineError, match="not running"):
        run.stages(4)
    heir = rollout(**{**SMALL, **flow}, max_staleness=2)
    heir.buffer.load_state_dict(state["buffer"])
    heir.prompts.load_state_dict(state["prompts"])
    heir.sync(version)
    heir.stages(4)
    heir.end_streams()
    heir.check_all_tokens()
    balance = heir.scheduler.figures.balance()
    assert balance.restored == saved
    assert balance.missing == 0


@every_flow
def test_an_engine_that_dies_in_an_evaluation_is_told_by_its_death(rollout, flow):
    run = rollout(**{**SMALL, **flow}, max_staleness=2)
    run.sync()
    run.stages(2)
    other = rollout(**SMALL, shared=run.shared, loop=run.loop, name="val", seed=9, is_alone=True)
    run.engine.faults = Faults(die_after_tokens=run.engine.tokens_made + 10)
    with pytest.raises(EngineError, match="died"):
        other.collect()
    run.run(other.scheduler.close())
    with pytest.raises(EngineError, match="not running"):
        run.stages(2)


@pytest.mark.parametrize("keeps", [False, True])
def test_streaming_goes_on_after_an_evaluation_that_is_left_open(rollout, keeps):
    run = rollout(**SMALL, streams=True, keeps=keeps, training_s=1.0, max_staleness=2)
    run.sync()
    run.stages(3)
    other = rollout(**SMALL, shared=run.shared, loop=run.loop, name="val", seed=9, is_alone=True)
    other.collect()
    assert run.buffer.can_take()  # so that there is nothing to wait for
    before = len(run.events)
    run.collect()
    run.sync()
    assert {event.kind for event in run.events[before:]} >= {"start", "chunk", "finish"}
    check(run, 2, other.scheduler.figures.balance().generated)
