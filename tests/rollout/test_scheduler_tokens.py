"""What reaches training is what the engine made: every token, once, under its own version."""

from __future__ import annotations

from collections import Counter

import pytest

from copris_lightning.engines.simulated_tokens import Faults, LengthModel
from copris_lightning.rollout.task import trajectory_seed

ODD_CHUNKS = Faults(empty_chunk_rate=0.3, late_finish_rate=0.5)


@pytest.mark.parametrize("faults", [Faults(), ODD_CHUNKS], ids=["plain", "odd-chunks"])
@pytest.mark.parametrize("max_staleness", [None, 0, 1, 2])
def test_every_token_over_many_stages_is_the_one_its_version_makes(rollout, faults, max_staleness):
    run = rollout(max_staleness=max_staleness, faults=faults, max_new_tokens=32)
    run.stages(60)
    run.check_all_tokens()
    run.check_conservation()
    mixed = sum(len(t.segments) > 1 for group in run.groups for t in group.trajectories)
    assert (mixed > 0) == (max_staleness != 0)


@pytest.mark.parametrize("cap", [1, 2, 5, 40])
def test_tokens_are_right_for_any_cap(rollout, cap):
    run = rollout(cap=cap, faults=ODD_CHUNKS, max_new_tokens=24)
    run.stages(40)
    run.check_all_tokens()
    run.check_conservation()


def test_tokens_are_right_when_the_cap_is_larger_than_all_work(rollout):
    run = rollout(cap=1000, prompts=20, faults=ODD_CHUNKS)
    run.stages(10)
    assert max(event.in_flight for event in run.events) <= 60
    assert Counter(run.trained()) == Counter(f"p{i}" for i in range(20))
    run.check_all_tokens()


def test_a_thousand_stages_lose_and_double_nothing(rollout):
    run = rollout(cap=6, batch_groups=1, group_size=2, median=5.0, max_new_tokens=20)
    run.stages(1000)
    run.check_all_tokens()
    run.check_conservation()


def test_several_stages_under_one_version_continue_the_same_segment(rollout):
    run = rollout(median=20.0)
    for _ in range(20):
        run.collect()
    run.check_all_tokens()
    assert all(len(t.segments) < 2 for group in run.groups for t in group.trajectories)


def test_kept_tokens_are_exactly_the_emitted_ones(rollout):
    run = rollout(faults=ODD_CHUNKS)
    run.stages(40)
    delivered = [t for group in run.groups for t in group.trajectories]
    kept = {
        run.seed_of((t.group_id, t.sample)): t.tokens.tolist()
        for t in [*delivered, *run.buffer.trajectories()]
        if t.response_length
    }
    assert kept == {seed: tokens for seed, tokens in run.engine.emitted.items() if tokens}


def prompt_and_response(run, request):
    """Splits a request; groups are admitted in the prompts' order, so their numbers agree."""
    prompt = run.prompts.get(int(request.request_id.split("-")[1])).token_ids
    assert request.token_ids[: len(prompt)] == prompt
    return prompt, request.token_ids[len(prompt) :]


def test_requests_ask_for_the_remaining_budget_only(rollout):
    run = rollout(max_new_tokens=20, median=15.0, faults=ODD_CHUNKS)
    run.stages(80)
    resumed = 0
    for request in run.engine.requests:
        _, response = prompt_and_response(run, request)
        assert len(response) + request.max_new_tokens == 20
        resumed += bool(response)
    assert resumed > 50
    limits = [t for group in run.groups for t in group.trajectories if t.finish_reason == "length"]
    assert any(len(t.segments) > 1 for t in limits)


def test_a_response_that_ended_is_never_asked_for_again(rollout):
    # A late finish reason leaves time for a stop between the last token and the reason.
    run = rollout(max_new_tokens=6, median=6.0, faults=Faults(late_finish_rate=1.0), cap=20)
    run.stages(150)
    for request in run.engine.requests:
        assert request.max_new_tokens > 0
        assert 3 not in prompt_and_response(run, request)[1]
    ended = set()
    for event in run.of_kind("start", "resume", "chunk", "finish"):
        assert event.key not in ended
        if event.kind == "finish":
            ended.add(event.key)
    run.check_all_tokens()


def test_request_ids_are_never_reused(rollout):
    run = rollout()
    run.stages(40)
    ids = [request.request_id for request in run.engine.requests]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("train-") for name in ids)


def test_a_trajectory_keeps_its_seed_over_resumes_and_shares_it_with_no_other(rollout):
    run = rollout()
    run.stages(40)
    owners: dict[int, set[str]] = {}
    for request in run.engine.requests:
        trajectory = request.request_id.rsplit("-", 1)[0]
        owners.setdefault(request.seed, set()).add(trajectory)
    assert all(len(names) == 1 for names in owners.values())
    assert len({name for names in owners.values() for name in names}) == len(owners)


def test_seeds_differ_over_runs_groups_and_samples_and_fit_63_bits():
    seeds = {
        trajectory_seed(seed, group, sample)
        for seed in (0, 1, 12)
        for group in range(300)
        for sample in range(16)
    }
    assert len(seeds) == 3 * 300 * 16
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_of_a_group_differ(rollout):
    run = rollout(median=30.0)
    run.stages(10)
    for group in run.groups:
        responses = [tuple(t.tokens[:3]) for t in group.trajectories]
        assert len(set(responses)) == len(responses)


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(rollout):
    runs = [rollout(seed=seed, faults=ODD_CHUNKS) for seed in (4, 4, 5)]
    for run in runs:
        run.stages(25)
    assert runs[0].events == runs[1].events
    assert runs[0].groups == runs[1].groups
    assert runs[0].events != runs[2].events


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_no_delivered_token_lags_more_than_the_bound(rollout, max_staleness):
    # sigma 1.8: in most groups one straggler is many times as long as its siblings.
    run = rollout(max_staleness=max_staleness, cap=30, group_size=4, sigma=1.8, max_new_tokens=120)
    lags: Counter[int] = Counter()
    for _ in range(40):
        groups, _ = run.collect()
        for group in groups:
            for trajectory in group.trajectories:
                lags.update(run.shared.version - s.version for s in trajectory.segments)
        run.sync()
    assert max(lags) == max_staleness
    run.check_conservation()


def test_without_a_bound_a_heavy_tail_lags_further(rollout):
    run = rollout(cap=30, group_size=4, sigma=1.8, max_new_tokens=120)
    lags = set()
    for _ in range(40):
        groups, _ = run.collect()
        rows = [t for g in groups for t in g.trajectories]
        lags |= {run.shared.version - s.version for t in rows for s in t.segments}
        run.sync()
    assert max(lags) > 2


def test_each_prompt_of_a_long_heavy_tailed_run_is_delivered_once_and_in_time(rollout):
    run = rollout(cap=24, prompts=160, sigma=1.8, max_new_tokens=100, group_size=4)
    admitted_in: dict[int, int] = {}
    waits: dict[str, int] = {}
    for stage in range(80):
        groups, _ = run.collect()
        for event in run.of_kind("start"):
            admitted_in.setdefault(event.key[0], stage)
        run.events.clear()
        for group in groups:
            waits[group.trajectories[0].prompt_id] = stage - admitted_in[group.group_id]
        run.sync()
    assert Counter(run.trained()) == Counter(f"p{i}" for i in range(160))
    assert run.prompts.taken == 160
    # The oldest are resumed first, so that none waits for more stages than it has tokens.
    assert 1 < max(waits.values()) <= 100, f"longest wait: {max(waits.values())} stages"
    run.check_all_tokens()


def test_length_model_of_these_tests_has_a_long_tail():
    means = sorted(LengthModel(8.0, 1.8).mean(trajectory_seed(0, g, 0)) for g in range(400))
    assert means[-1] > 20 * means[200]
