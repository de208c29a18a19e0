"""Weights swapped at any moment of a rollout: nothing is lost, mislabelled or counted wrongly."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trajectories import plain, versions

from copris_lightning.core.buffer import Status
from copris_lightning.engines.simulated_tokens import Faults

SMALL = {"cap": 4, "batch_groups": 1, "group_size": 2, "median": 6.0, "max_new_tokens": 20}
ODD = Faults(empty_chunk_rate=0.2, late_finish_rate=0.5)

under_fire = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def letters(token_ids: Sequence[int]) -> str:
    return "".join(string.ascii_letters[token] for token in token_ids)


def swap_at(run: Any, indices: set[int], ticks: int = 0) -> list[asyncio.Task[None]]:
    """Swap weights at events, by their index, unless a swap is going on.

    Args:
        ticks: turns of the event loop from the event to the swap.
    """
    swaps: list[asyncio.Task[None]] = []

    async def swap(version: int) -> None:
        for _ in range(ticks):
            await asyncio.sleep(0)
        await run.swap(version)

    def look(event: Any) -> None:
        if len(run.events) - 1 in indices and (not swaps or swaps[-1].done()):
            swaps.append(run.loop.create_task(swap(run.shared.version + 1)))

    run.watchers.append(look)
    return swaps


async def all_of(swaps: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*swaps)


def take(run: Any, swaps: list[asyncio.Task[None]], stages: int) -> None:
    """Stages, of which each begins when no swap is going on."""
    for _ in range(stages):
        run.collect()
        run.run(all_of(swaps))


def check(run: Any) -> None:
    run.check_all_tokens()
    run.check_conservation()
    balance = run.scheduler.figures.balance()
    assert balance.missing == 0
    assert balance.generated == run.engine.tokens_made
    assert balance.delivered == sum(t.response_length for g in run.groups for t in g.trajectories)


@pytest.mark.parametrize(("interval", "ticks"), [(1, 0), (1, 1), (8, 0), (8, 3)])
def test_a_swap_at_any_event_loses_and_mislabels_nothing(rollout, interval, ticks):
    config = {**SMALL, "faults": ODD, "stream_interval": interval}
    plain = rollout(**config)
    take(plain, [], 3)
    assert {event.kind for event in plain.events} >= {"start", "resume", "finish", "score"}
    for index in range(len(plain.events)):
        run = rollout(**config)
        swaps = swap_at(run, {index}, ticks)
        take(run, swaps, 4)
        assert len(swaps) == 1
        assert run.shared.version == 1
        check(run)
        run.close()


@under_fire
@given(
    indices=st.sets(st.integers(0, 250), max_size=40),
    interval=st.sampled_from([1, 3, 8]),
    cap=st.integers(1, 9),
    ticks=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_swaps_at_many_events_lose_and_mislabel_nothing(
    rollout, indices, interval, cap, ticks, seed
):
    run = rollout(**{**SMALL, "cap": cap}, faults=ODD, stream_interval=interval, seed=seed)
    take(run, swap_at(run, indices, ticks), 8)
    check(run)
    run.close()


@under_fire
@given(
    indices=st.sets(st.integers(0, 400), max_size=30),
    dropping=st.integers(2, 5),
    cap=st.integers(2, 12),
    seed=st.integers(0, 5),
)
def test_tokens_balance_under_every_rule_that_drops_some(rollout, indices, dropping, cap, seed):
    dropped = []

    def accept(group):
        tokens = sum(t.response_length for t in group.trajectories)
        if tokens % dropping == 0:
            dropped.append(tokens)
        return tokens % dropping != 0

    run = rollout(
        **{**SMALL, "cap": cap, "median": 30.0},
        stream_interval=8,
        seed=seed,
        decode=letters,
        stops=tuple(a + b for a in string.ascii_letters[10:30] for b in "abcdefgh"),
        accept=accept,
    )
    swaps = swap_at(run, indices)
    for _ in range(8):
        _, stats = run.collect()
        balance = stats.balance
        assert balance.missing == 0
        assert balance.generated == sum(event.tokens for event in run.of_kind("chunk"))
        assert balance.dropped.get("dropped_group", 0) == sum(dropped)
        run.run(all_of(swaps))
    assert run.scheduler.figures.balance().missing == 0
    run.close()


def test_how_coarsely_tokens_come_does_not_matter(rollout):
    """What a hold finds unread was lost when streams were cancelled."""
    runs = [rollout(stream_interval=interval, median=20.0) for interval in (1, 8)]
    for run in runs:
        run.stages(25)
        check(run)
    assert runs[0].groups == runs[1].groups
    assert plain(runs[0].buffer.state_dict()) == plain(runs[1].buffer.state_dict())
    assert len(runs[1].of_kind("chunk")) < len(runs[0].of_kind("chunk")) / 3


def test_a_balance_begins_with_what_was_restored(rollout):
    run = rollout(stream_interval=8)
    run.stages(4)
    again = rollout(stream_interval=8)
    again.sync(run.shared.version)
    again.buffer.load_state_dict(run.buffer.state_dict())
    again.prompts.taken = run.prompts.taken
    _, stats = again.collect()
    assert stats.balance.restored == run.scheduler.figures.balance().carried > 0
    assert stats.balance.missing == 0


def test_a_take_waits_while_the_engine_is_held_for_weights(rollout):
    run = rollout()

    async def held_first():
        await run.shared.hold()
        taking = asyncio.create_task(run.scheduler.take())
        await asyncio.sleep(10.0)
        assert not run.events
        await run.shared.release(3)
        groups, _ = await taking
        return groups

    groups = run.run(held_first())
    assert {v for group in groups for t in group.trajectories for v in versions(t)} == {3}


def test_kv_is_kept_between_two_stages_and_cleared_where_weights_may_be_new(rollout):
    run = rollout()
    run.collect()
    run.collect()
    run.sync(0)  # other weights may bear the version that the engine booted with
    run.collect()
    run.collect()
    assert run.engine.releases == [(0, False), (0, False), (0, True), (0, False)]


# -- several on one engine -----------------------------------------------------------------


def test_training_and_an_evaluation_at_once_share_one_cap(rollout):
    run = rollout(cap=10, batch_groups=3, median=12.0)
    other = rollout(
        cap=10, batch_groups=5, group_size=2, shared=run.shared, loop=run.loop, name="val", seed=9
    )
    seen = []
    for one in (run, other):
        one.watchers.append(lambda e: seen.append(run.buffer.in_flight + other.buffer.in_flight))

    async def both():
        return await asyncio.gather(run.scheduler.take(), other.scheduler.take())

    for _ in range(10):
        taken = run.run(both())
        for one, (groups, stats) in zip((run, other), taken, strict=True):
            one.groups += groups
            assert stats.balance.missing == 0
        assert run.buffer.in_flight == other.buffer.in_flight == 0
        run.sync()
    assert max(seen) == 10
    for one in (run, other):
        assert len(one.of_kind("resume")) > 10
        one.check_all_tokens()
        one.check_conservation()
    other.run(other.scheduler.close())


def test_who_does_not_wait_for_a_batch_starts_nothing(rollout):
    run = rollout(cap=10)
    run.collect()
    resting = len(run.events)
    other = rollout(cap=10, shared=run.shared, loop=run.loop, name="val", seed=9)
    other.stages(3)
    assert len(run.events) == resting
    assert run.buffer.count(Status.CARRIED_OVER) > 0
    assert run.buffer.version == 3
    other.run(other.scheduler.close())


# -- what is asked for ---------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [True, False])
def test_log_probs_are_asked_for_only_where_the_task_says_so(rollout, logprobs):
    run = rollout(logprobs=logprobs)
    run.stages(3)
    assert {request.decoding.logprobs for request in run.engine.requests} == {logprobs}
    rows = [t for g in run.groups for t in g.trajectories]
    assert {"engine" in t.logprobs for t in rows} == {logprobs}
