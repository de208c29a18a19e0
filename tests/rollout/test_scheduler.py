"""What a stage does and when: the cap, its end, the carry-over, the order of work."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from copris_lightning.core.buffer import Status
from copris_lightning.engines.simulated_tokens import Faults, LengthModel, StepTime
from copris_lightning.errors import RolloutError


def stage_events(run):
    """The events of each stage so far."""
    stages, current = [], []
    for event in run.events:
        current.append(event)
        if event.kind == "deliver":
            stages.append(current)
            current = []
    return stages


def watch_cap(run):
    """Notes, after the initial filling, each moment below the cap at which work was left.

    The end of a stage is the moment at which a batch is ready: nothing is started from then on.
    """
    idle = []
    filling = True

    def look(event):
        nonlocal filling
        buffer = run.buffer
        assert event.in_flight == buffer.in_flight <= buffer.limit
        if event.kind in ("start", "resume") and filling:
            return
        filling = event.kind == "deliver"
        if event.kind in ("deliver", "carry_over") or buffer.can_take():
            return
        queued = buffer.count(Status.WAITING) + buffer.count(Status.CARRIED_OVER)
        left = run.prompts.limit is None or run.prompts.taken < run.prompts.limit
        if buffer.in_flight < buffer.limit and (queued or (left and buffer.may_admit())):
            idle.append(event)

    run.watchers.append(look)
    return idle


@pytest.mark.parametrize("cap", [1, 3, 12, 40])
@pytest.mark.parametrize("max_staleness", [None, 0, 1])
def test_in_flight_equals_the_cap_while_work_may_be_started(rollout, cap, max_staleness):
    faults = Faults(empty_chunk_rate=0.2, late_finish_rate=0.3)
    run = rollout(cap=cap, max_staleness=max_staleness, faults=faults)
    idle = watch_cap(run)
    run.stages(30)
    assert idle == []


@pytest.mark.parametrize("cap", [1, 12, 40])
def test_without_a_staleness_bound_the_cap_is_always_full(rollout, cap):
    run = rollout(cap=cap)
    seconds = 0.0
    for _ in range(30):
        _, stats = run.collect()
        seconds += stats.seconds
        if stats.seconds:
            assert stats.in_flight_mean == pytest.approx(cap)
        run.sync()
    assert seconds > 0
    assert max(event.in_flight for event in run.events) == cap


def test_the_cap_stays_full_with_slow_rewards(rollout):
    async def slow(response, prompt):
        await asyncio.sleep(0.5)
        return 1.0

    run = rollout(scorer=slow)
    idle = watch_cap(run)
    run.stages(10)
    assert idle == []


def test_the_stage_ends_the_moment_the_batch_is_ready(rollout):
    run = rollout()
    ready_since = []

    def look(event):
        if event.kind == "score" and run.buffer.can_take():
            ready_since.append(event.time)

    run.watchers.append(look)
    for _ in range(20):
        ready_since.clear()
        groups, stats = run.collect()
        assert len(groups) == 2
        if stats.seconds:
            assert run.events[-1].time == ready_since[0]
            assert run.buffer.count(Status.CARRIED_OVER) > 0
        assert run.buffer.in_flight == 0
        run.sync()


def test_nothing_is_started_for_a_stage_that_is_about_to_end(rollout):
    async def three_steps(response, prompt):
        await asyncio.sleep(3 * StepTime(0.02, 0.0002)(40))
        return 1.0

    # Rewards arrive in the same moment as tokens: other responses end after the last reward.
    run = rollout(cap=40, group_size=2, median=4.0, scorer=three_steps)
    late = []

    def look(event):
        if event.kind in ("start", "resume") and run.buffer.can_take():
            late.append(event)

    run.watchers.append(look)
    run.stages(50)
    assert late == []


def test_a_ready_batch_is_delivered_without_asking_the_engine(rollout):
    # With short responses many groups become ready in one step: some stages find their batch.
    run = rollout(cap=40, batch_groups=1, group_size=2, median=2.0, max_new_tokens=4)
    run.stages(30)
    instant = [events for events in stage_events(run) if events[0].kind == "deliver"]
    assert instant
    assert all(len(events) == 1 for events in instant)


def test_surplus_groups_are_kept_and_delivered_next_oldest_first(rollout):
    run = rollout(cap=40, batch_groups=1, group_size=2, median=2.0, max_new_tokens=4)
    kept = 0
    for _ in range(40):
        ready = sorted({key[0] for key in run.buffer.keys(Status.READY)})
        groups, stats = run.collect()
        if ready:
            assert groups[0].group_id == ready[0]
            kept += 1
        assert stats.ready_groups == run.buffer.ready_groups
        run.sync()
    assert kept > 5
    run.check_conservation()


def test_what_was_carried_over_is_resumed_first_and_oldest_first(rollout):
    run = rollout(cap=12)
    run.collect()
    run.sync()
    seen = 0
    for _ in range(25):
        carried = run.buffer.keys(Status.CARRIED_OVER)
        lengths = [run.buffer.trajectory(key).response_length for key in carried]
        assert run.buffer.can_take() or carried
        run.events.clear()
        _, stats = run.collect()
        started = run.of_kind("start", "resume")
        if started:
            assert [event.key for event in started[: len(carried)]] == carried
            assert [event.tokens for event in started[: len(carried)]] == lengths
            assert stats.resent_tokens == sum(event.tokens for event in started)
            seen += len(carried)
        run.sync()
    assert seen > 200


def test_resume_events_are_those_with_a_response_to_send_again(rollout):
    run = rollout()
    run.stages(20)
    assert run.of_kind("resume")
    assert all(event.tokens > 0 for event in run.of_kind("resume"))
    assert all(event.tokens == 0 for event in run.of_kind("start"))


def test_leftovers_of_a_stage_are_carried_over(rollout):
    run = rollout()
    for _ in range(10):
        run.events.clear()
        _, stats = run.collect()
        over = [event.key for event in run.of_kind("carry_over")]
        assert over == run.buffer.keys(Status.CARRIED_OVER)
        assert stats.carried_over == len(over)
        run.sync()


def test_stage_stats_add_up(rollout):
    run = rollout()
    for _ in range(10):
        run.events.clear()
        began = run.loop.time()
        _, stats = run.collect()
        assert stats.tokens == sum(event.tokens for event in run.of_kind("chunk"))
        assert stats.seconds == pytest.approx(run.events[-1].time - began)
        run.sync()


def test_running_out_of_prompts_is_an_error_that_says_so(rollout):
    run = rollout(prompts=5, batch_groups=2)
    run.stages(2)
    with pytest.raises(RolloutError, match=r"prompts are used up: 1 groups are ready.* takes 2"):
        run.collect()
    assert run.buffer.ready_groups == 1
    assert run.buffer.in_flight == 0


def test_no_prompts_at_all_is_an_error_at_once(rollout):
    run = rollout(prompts=0)
    with pytest.raises(RolloutError, match="prompts are used up: 0 groups"):
        run.collect()
    assert run.loop.time() == 0


def test_the_next_collect_after_running_out_goes_on_if_prompts_arrive(rollout):
    run = rollout(prompts=1)
    with pytest.raises(RolloutError):
        run.collect()
    run.prompts.limit = 2
    run.collect()
    assert sorted(run.trained()) == ["p0", "p1"]


def test_rewards_do_not_slow_down_the_tokens(rollout):
    async def slow(response, prompt):
        await asyncio.sleep(5.0)
        return 1.0

    fast, slowed = rollout(), rollout(scorer=slow)
    fast.collect()
    slowed.collect()
    before = [e for e in fast.of_kind("chunk", "start") if e.time < fast.events[-1].time]
    assert slowed.of_kind("chunk", "start")[: len(before)] == before
    times = sorted({event.time for event in slowed.of_kind("chunk")})
    step = StepTime(0.02, 0.0002)(12)
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(gaps) > 5.0
    assert all(gap == pytest.approx(step) for gap in gaps)


def test_rewards_still_awaited_go_on_after_the_stage(rollout):
    delays = iter([0.0] * 6 + [3.0] * 1000)

    async def slow(response, prompt):
        await asyncio.sleep(next(delays))
        return 1.0

    run = rollout(cap=40, scorer=slow, median=4.0)
    run.collect()
    waiting = run.buffer.keys(Status.FINISHED)
    assert waiting
    run.events.clear()
    run.run(asyncio.sleep(5.0))
    assert sorted(event.key for event in run.of_kind("score")) == waiting
    assert run.buffer.keys(Status.FINISHED) == []


def test_each_response_is_scored_once_with_its_own_prompt(rollout):
    calls = []

    async def note(response, prompt):
        calls.append((response, prompt.id))
        return 1.0

    run = rollout(scorer=note)
    run.stages(20)
    inside = [t for t in run.buffer.trajectories() if t.finish_reason is not None]
    ended = [t for group in run.groups for t in group.trajectories] + inside
    expected = [(" ".join(map(str, t.tokens)), t.prompt_id) for t in ended]
    assert sorted(calls) == sorted(expected)


def test_an_evaluation_between_stages_leaves_training_unchanged(rollout):
    plain, evaluated = rollout(), rollout()
    for stage in range(12):
        plain.collect()
        evaluated.collect()
        plain.sync()
        evaluated.sync()
        if stage % 3 == 0:
            evaluation = rollout(
                cap=12,
                batch_groups=4,
                prompts=4,
                max_staleness=0,
                seed=99,
                shared=evaluated.shared,
                loop=evaluated.loop,
                name=f"val{stage}",
            )
            groups, _ = evaluation.collect()
            assert len(groups) == 4
            assert not evaluation.buffer.in_flight
            evaluation.check_all_tokens()
            evaluation.run(evaluation.scheduler.close())

    def log(run):
        return [(event.kind, event.key, event.tokens, event.in_flight) for event in run.events]

    assert log(plain) == log(evaluated)
    assert plain.groups == evaluated.groups
    evaluated.check_all_tokens()


def test_waiting_for_the_longest_answer_takes_longer_than_carrying_it_over(rollout):
    settings = {"cap": 32, "batch_groups": 8, "group_size": 4, "sigma": 1.5, "max_new_tokens": 200}
    carrying = rollout(**settings)
    waiting = rollout(**settings, max_staleness=0)
    carrying.stages(12)
    waiting.stages(12)
    ratio = waiting.loop.time() / carrying.loop.time()
    assert ratio > 1.2, f"waiting took {ratio:.2f} times as long"


def test_synchronous_stages_leave_nothing_behind(rollout):
    run = rollout(max_staleness=0)
    for _ in range(10):
        _, stats = run.collect()
        assert stats.carried_over == 0
        assert stats.ready_groups == 0
        assert stats.resent_tokens == 0
        run.sync()
    assert not run.of_kind("resume", "carry_over")
    assert len(run.groups) == run.prompts.taken


def test_length_model_means_do_not_fall_below_one_token():
    assert min(LengthModel(0.5, 2.0).mean(seed) for seed in range(200)) == 1.0
