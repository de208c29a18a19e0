"""Saved at any moment and restored elsewhere: no prompt is lost, doubled or trained too late."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter

import pytest
from trajectories import plain

from copris_lightning.core.buffer import Status
from copris_lightning.engines.simulated_tokens import Faults

SMALL = {
    "cap": 5,
    "batch_groups": 2,
    "group_size": 2,
    "median": 5.0,
    "max_new_tokens": 16,
    "prompts": 12,
    "faults": Faults(empty_chunk_rate=0.1, late_finish_rate=0.3),
}


def save(run):
    """What a checkpoint holds of a run."""
    return copy.deepcopy(
        {
            "buffer": run.buffer.state_dict(),
            "taken": run.prompts.taken,
            "trained": run.groups,
            "version": run.shared.version,
        }
    )


def restore(run, saved):
    saved = copy.deepcopy(saved)
    run.sync(saved["version"])
    run.buffer.load_state_dict(saved["buffer"])
    run.prompts.taken = saved["taken"]
    run.groups = saved["trained"]
    return run


def saves_of(run, stages):
    """One checkpoint at each event of a run, and one after each stage."""
    saves = []

    def look(event):
        if event.kind != "deliver":  # its groups are on their way to the trainer, which saves them
            saves.append(save(run))

    run.watchers.append(look)
    for _ in range(stages):
        run.collect()
        saves.append(save(run))
        run.sync()
        saves.append(save(run))
    run.watchers.clear()
    return saves


@pytest.mark.parametrize("max_staleness", [None, 0, 1])
def test_killed_at_any_event_the_restored_run_trains_each_prompt_once(rollout, max_staleness):
    settings = {**SMALL, "max_staleness": max_staleness}
    saves = saves_of(rollout(**settings), stages=6)
    assert len(saves) > 150
    every_prompt = Counter(f"p{i}" for i in range(12))
    for index, saved in enumerate(saves[::4]):
        run = restore(rollout(**settings), saved)
        while len(run.groups) < 12:
            groups, _ = run.collect()
            for trajectory in (t for group in groups for t in group.trajectories):
                lag = run.shared.version - min(s.version for s in trajectory.segments)
                assert max_staleness is None or lag <= max_staleness
            run.sync()
        assert Counter(run.trained()) == every_prompt, f"killed at save {4 * index}"
        run.check_all_tokens()
        run.check_conservation()
        run.close()


def test_a_run_restored_between_stages_goes_on_as_if_nothing_had_happened(rollout):
    settings = {"max_staleness": 2, "cap": 16, "sigma": 1.5}
    whole = rollout(**settings)
    whole.stages(5)
    second = restore(rollout(**settings), save(whole))
    whole.stages(10)
    second.stages(10)
    assert second.groups == whole.groups
    assert plain(second.buffer.state_dict()) == plain(whole.buffer.state_dict())


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_the_lag_bound_holds_over_many_restores(rollout, max_staleness):
    settings = {
        "max_staleness": max_staleness,
        "cap": 20,
        "group_size": 4,
        "sigma": 1.8,
        "max_new_tokens": 100,
    }
    run = rollout(**settings)
    lags: Counter[int] = Counter()
    for _ in range(8):
        for _ in range(3):
            groups, _ = run.collect()
            for trajectory in (t for group in groups for t in group.trajectories):
                lags.update(run.shared.version - s.version for s in trajectory.segments)
            run.sync()
        run = restore(rollout(**settings), save(run))
    assert max(lags) == max_staleness
    assert len(run.groups) == 48
    run.check_all_tokens()
    run.check_conservation()


def test_what_was_in_flight_is_resumed_with_the_tokens_it_had(rollout):
    settings = {**SMALL, "median": 20.0, "max_new_tokens": 40}
    run = rollout(**settings)
    saves = []

    def look(event):
        if event.kind == "chunk" and event.time > 0.2 and not saves:
            saves.append(save(run))

    run.watchers.append(look)
    run.collect()
    again = restore(rollout(**settings), saves[0])
    unfinished = {
        key: again.buffer.trajectory(key).response_length
        for key in again.buffer.keys(Status.CARRIED_OVER)
    }
    assert sum(unfinished.values()) > 15
    again.collect()
    first = again.of_kind("start", "resume")[: len(unfinished)]
    assert {event.key: event.tokens for event in first} == unfinished


def test_finished_responses_of_a_restored_run_are_scored_again_not_generated_again(rollout):
    async def never(response, prompt):
        await run.loop.create_future()

    run = rollout(**SMALL, scorer=never)
    task = run.loop.create_task(run.scheduler.take())
    run.loop.call_later(1.0, task.cancel)
    run.run(asyncio.wait([task]))
    finished = run.buffer.keys(Status.FINISHED)
    assert len(finished) > 4
    again = restore(rollout(**SMALL), save(run))
    again.stages(6)
    assert Counter(again.trained()) == Counter(f"p{i}" for i in range(12))
    generated = {event.key for event in again.of_kind("start", "resume")}
    assert not generated & set(finished)


def test_a_smaller_cap_resumes_all_old_work_before_any_new(rollout):
    run = rollout(cap=20, median=20.0)
    run.stages(3)
    carried = run.buffer.keys(Status.CARRIED_OVER)
    assert len(carried) > 10
    small = restore(rollout(cap=4, median=20.0), save(run))
    waiting = run.buffer.keys(Status.WAITING)
    while small.buffer.keys(Status.CARRIED_OVER) and len(small.groups) < 200:
        small.collect()
        if len(first_starts(small)) >= len(carried):
            break
        small.sync()
    assert first_starts(small)[: len(carried)] == carried
    assert not set(waiting) & set(carried)
    assert max(event.in_flight for event in small.events) == 4


def first_starts(run):
    """The trajectories in the order in which each was first put in flight."""
    return list(dict.fromkeys(event.key for event in run.of_kind("start", "resume")))
