"""A cap that follows the load of an engine whose KV cache is small, on virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from rollouts import VOCAB, Rollout

from copris_lightning.core.cap import Cap, Load
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import KVCache, LengthModel, StepTime
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.rollout.places import Places
from copris_lightning.rollout.shared_engine import SharedEngine

WARM_UP, STAGES = 10, 20


def rollout(cap: Cap | int, *, kv_tokens: int = 1500, **settings: Any) -> Rollout:
    """About 66 trajectories of its lengths fit 0.9 of the cache."""
    bounds = Cap(cap, cap) if isinstance(cap, int) else cap
    cache = KVCache(kv_tokens, prefix_s=2e-5)
    engine = SimulatedEngine(LengthModel(10.0, 1.0), StepTime(1.5e-3, 3e-5), kv_cache=cache)
    loop = VirtualClockLoop()
    spec = EngineSpec("none", bounds.most, 80, VOCAB, min_num_seqs=bounds.least)
    loop.run_until_complete(engine.start(spec))
    flow = {name: settings.pop(name) for name in ("keeps", "streams") if name in settings}
    shared = SharedEngine(engine, cap, **flow)
    sizes = {"batch_groups": 16, "group_size": 4, "max_new_tokens": 60}
    return Rollout(engine=engine, shared=shared, loop=loop, cap=bounds.most, **sizes, **settings)


def preempted_per_response(run: Rollout, stages: int) -> float:
    before, responses = run.engine.load().preemptions, 0
    for _ in range(stages):
        groups, _ = run.collect()
        responses += sum(len(group.trajectories) for group in groups)
        run.sync()
    return (run.engine.load().preemptions - before) / responses


@pytest.mark.parametrize("start", [8, 256], ids=["from below", "from above"])
def test_the_limit_does_not_swing(start: int) -> None:
    """After ten stages it stays within 15 % of itself over twenty more, wherever it began."""
    run = rollout(Cap(8, 256))
    run.shared.places.restore(start)
    run.stages(WARM_UP)
    limits, caps = [], []
    for _ in range(STAGES):
        _, stats = run.collect()
        limits.append(run.shared.places.limit())
        caps.append(stats.cap_mean)
        assert stats.in_flight_mean == pytest.approx(stats.cap_mean, rel=0.02)
        run.sync()
    mean = sum(limits) / STAGES
    assert (max(limits) - min(limits)) / mean < 0.15
    assert 55 < mean < 75
    assert sum(caps) / STAGES == pytest.approx(mean, rel=0.05)
    run.close()


def test_it_preempts_a_tenth_of_what_a_cap_does_that_does_not_fit() -> None:
    following, fixed = rollout(Cap(8, 256)), rollout(256)
    following.stages(WARM_UP)
    fixed.stages(WARM_UP)
    many = preempted_per_response(fixed, STAGES)
    assert preempted_per_response(following, STAGES) < many / 10
    for run in (following, fixed):
        run.close()


@pytest.mark.parametrize("flow", [{}, {"keeps": True}, {"streams": True, "max_staleness": 4}])
def test_what_is_put_back_or_not_started_is_carried_over(flow: dict[str, Any]) -> None:
    """The limit falls from 256 to what fits, and every token is where and what it should be."""
    run = rollout(Cap(8, 256), **flow)
    run.shared.places.restore(256)
    over = []
    run.watchers.append(lambda event: over.append(event.in_flight - run.shared.limit))
    run.stages(6)
    assert run.engine.load().preemptions > 0
    assert run.shared.limit < 128
    assert max(over) == 0  # it falls by a place with an end, so that in flight is never above it
    run.end_streams()
    run.check_conservation()
    run.check_all_tokens()
    assert run.scheduler.figures.balance().missing == 0
    run.close()


def test_equal_bounds_are_the_fixed_cap_event_by_event() -> None:
    runs = [rollout(40), rollout(Cap(40, 40))]
    for run in runs:
        run.stages(3)
        run.close()
    assert runs[0].events == runs[1].events


def test_who_is_alone_has_a_limit_of_their_own() -> None:
    """Long answers of an evaluation leave training's limit as it was."""
    run = rollout(Cap(8, 256))
    run.stages(WARM_UP)
    before = run.shared.places.limit()
    alone = Rollout(
        shared=run.shared, loop=run.loop, cap=256, is_alone=True, name="evaluation",
        batch_groups=40, group_size=4, max_new_tokens=200, median=100.0,
    )  # fmt: skip
    alone.collect()
    assert run.shared.limit != int(before)
    assert run.shared.places.limit() == before
    run.run(alone.scheduler.close())
    assert run.shared.limit == int(before)
    run.close()


def test_what_was_put_back_before_a_hold_is_no_news() -> None:
    """So that a run that goes on from a checkpoint, with an engine that is new, is the same."""

    class Engine:
        preemptions = 0

        def load(self) -> Load:
            return Load(50, 0, 0.9, self.preemptions)

    limits = []
    for preempted in (0, 7):
        engine = Engine()
        places = Places(engine, Cap(1, 100))
        places.restore(50.0)
        engine.preemptions = preempted
        places.begin()
        places.ended(None, 49)
        limits.append(places.limit())
    assert limits[0] == limits[1]
