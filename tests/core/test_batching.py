"""Partitions are optimal and complete; padded batches point at the right tokens."""

import math
from dataclasses import fields
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import trajectory, versions

from copris_lightning.core.batching import NO_TOTALS, MicroBatch, collate, length_mask
from copris_lightning.core.estimator.normalization import UpdateTotals
from copris_lightning.core.outcome import TRUNCATED, Credit, Excluded
from copris_lightning.core.partition import cut_by_length, forward_cost, partition
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import Trajectory

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=8)
COSTS = st.sampled_from([float, lambda n: n * n, forward_cost(4), forward_cost(1024)])


def flat(parts):
    return [i for part in parts for i in part]


def dearest(parts, lengths, cost):
    return max(len(part) * cost(max(lengths[i] for i in part)) for part in parts)


@settings(max_examples=120, deadline=None)
@given(LENGTHS, COSTS, st.data())
def test_a_partition_is_complete_and_its_dearest_part_as_cheap_as_any_cut(lengths, cost, data):
    parts = data.draw(st.integers(1, len(lengths)))
    actual = partition(lengths, parts, cost)
    assert len(actual) == parts
    assert all(actual)
    assert sorted(flat(actual)) == list(range(len(lengths)))
    in_order = [lengths[i] for i in flat(actual)]
    assert in_order == sorted(lengths, reverse=True)
    order = flat(actual)
    best = min(
        dearest([order[a:b] for a, b in pairwise((0, *cuts, len(order)))], lengths, cost)
        for cuts in combinations(range(1, len(order)), parts - 1)
    )
    assert dearest(actual, lengths, cost) == pytest.approx(best, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4000), min_size=64, max_size=200), st.integers(1, 64))
def test_a_large_partition_is_complete(lengths, parts):
    actual = partition(lengths, parts, forward_cost(64))
    assert len(actual) == parts
    assert all(actual)
    assert sorted(flat(actual)) == list(range(len(lengths)))


def test_equal_lengths_are_split_evenly():
    sizes = [len(part) for part in partition([5] * 12, 4, float)]
    assert sizes == [3, 3, 3, 3]


def test_one_long_row_stands_alone():
    assert partition([1, 1, 100, 1], 2, float) == [[2], [0, 1, 3]]


@pytest.mark.parametrize(("count", "parts"), [(2, 3), (0, 1), (3, 0), (3, -1)])
def test_parts_that_cannot_be_filled_are_refused(count, parts):
    with pytest.raises(ValueError, match=f"{count} trajectories cannot fill {parts}"):
        partition([4] * count, parts, float)


def test_forward_cost_adds_attention_to_linear_layers():
    assert forward_cost(8)(0) == 0
    assert forward_cost(8)(96) == 96 + 96
    assert forward_cost(10**9)(1000) == pytest.approx(1000)


def set_partitions(items):
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in set_partitions(rest):
        yield [[first], *smaller]
        for i, part in enumerate(smaller):
            yield [*smaller[:i], [first, *part], *smaller[i + 1 :]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=6), st.integers(1, 40), st.integers(0, 20))
def test_no_other_passes_cost_less_than_those_cut_by_length(lengths, limit, pass_tokens):
    def padded(part):
        return len(part) * max(lengths[i] for i in part)

    def cost(parts):
        return sum(padded(part) + pass_tokens for part in parts)

    def fits(parts):
        return all(len(part) == 1 or padded(part) <= limit for part in parts)

    actual = cut_by_length(lengths, limit, pass_tokens)
    assert sorted(flat(actual)) == list(range(len(lengths)))
    assert all(actual)
    assert fits(actual)
    assert cost(actual) == min(
        cost(parts) for parts in set_partitions(list(range(len(lengths)))) if fits(parts)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(45, 141), min_size=64, max_size=64))
def test_passes_over_a_batch_of_responses_hold_little_padding(lengths):
    """What 64 rows of 45 to 141 tokens in one pass took was up to three times what they need."""
    passes = cut_by_length(lengths, 16_384)
    padded = sum(len(part) * max(lengths[i] for i in part) for part in passes)
    assert padded <= 1.25 * sum(lengths)
    assert len(passes) <= 8


def test_a_few_short_sequences_are_one_pass():
    assert len(cut_by_length([20, 9, 14, 2], 16_384)) == 1
    assert cut_by_length([], 16_384) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9))
def test_a_length_mask_is_true_below_each_length(lengths, size):
    mask = length_mask(torch.tensor(lengths), size)
    assert mask.dtype is torch.bool
    assert mask.tolist() == [[i < n for i in range(size)] for n in lengths]


def lists_of(count):
    return st.lists(st.floats(-9, 0, width=32), min_size=count, max_size=count)


@st.composite
def trajectories(draw):
    """Rows of few token ids, so that the padding's value occurs everywhere in them."""
    rows, recomputed = [], draw(st.booleans())
    for i in range(draw(st.integers(1, 5))):
        prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        t = Trajectory(i, 0, f"p{i}", tuple(prompt), 100)
        version = draw(st.integers(0, 2))
        for _ in range(draw(st.integers(0, 3))):
            size = draw(st.integers(1, 4))
            tokens = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
            values = lists_of(size)
            t.append(tokens, draw(values), version)
            if draw(st.booleans()):
                t.observe(tokens)
            t.add_logprobs("trainer", draw(lists_of(t.response_length)))
            version += draw(st.integers(1, 2))
        if draw(st.booleans()):
            excluded = draw(st.sampled_from([None, TRUNCATED, Excluded("its reward is nan")]))
            t.credit = Credit(draw(st.floats(-2, 2, width=32)), excluded)
        if recomputed:
            t.add_logprobs("proximal", draw(lists_of(t.response_length)))
        rows.append(t)
    return rows


TOTALS = UpdateTotals(trajectories=7, tokens=33, max_new_tokens=100)


@settings(max_examples=100, deadline=None)
@given(trajectories(), st.sampled_from(["engine", "trainer", None]))
def test_every_field_of_a_padded_batch_is_aligned_with_its_tokens(rows, source):
    batch = collate(
        rows,
        source=source,
        policy_version=9,
        sampling=Sampling(0.7),
        totals=TOTALS,
        quarantine_limit=2,
    )
    longest = max(len(t.sequence) for t in rows)
    width = max(1, *(t.response_length for t in rows))
    assert batch.input_ids.shape == (len(rows), longest)
    assert batch.behavior_logprobs.shape == batch.versions.shape == (len(rows), width)
    assert (batch.policy_version, batch.sampling) == (9, Sampling(0.7))
    assert (batch.totals, batch.quarantine_limit) == (TOTALS, 2)
    assert (batch.is_last, batch.metrics) == (False, {})
    assert batch.names == [t.name for t in rows]
    assert (batch.mismatch is None) == (source != "trainer")
    known = not any(t.missing("proximal") for t in rows)
    assert (batch.proximal_logprobs is not None) == known
    for i, t in enumerate(rows):
        prompt, n = len(t.prompt), t.response_length
        sequence, labels = [*t.prompt, *t.tokens], versions(t)
        padding = [0.0] * (width - n)
        assert batch.input_ids[i].tolist() == sequence + [0] * (longest - len(sequence))
        assert (batch.prompt_lengths[i], batch.response_lengths[i]) == (prompt, n)
        assert batch.lengths[i] == prompt + n
        assert batch.attention_mask[i].tolist() == [1] * (prompt + n) + [0] * (longest - prompt - n)
        assert batch.response_mask[i].tolist() == [True] * n + [False] * (width - n)
        assert batch.included[i] == (t.excluded is None)
        written = [v is not None for v in labels]
        assert batch.written[i].tolist() == written + [False] * (width - n)
        assert batch.written_lengths[i] == t.written_tokens == sum(written)
        counts = [w and t.excluded is None for w in written] + [False] * (width - n)
        assert batch.loss_mask[i].tolist() == counts
        positions = batch.response_positions[i]
        assert batch.input_ids[i][positions][:n].tolist() == t.tokens.tolist()
        assert positions[:n].tolist() == list(range(prompt, prompt + n))
        assert positions.max() < longest
        values = t.column(source).tolist() if source else [0.0] * n
        assert batch.behavior_logprobs[i].tolist() == values + padding
        assert batch.versions[i].tolist() == [v or 0 for v in labels] + [0] * (width - n)
        lags = [0 if v is None else 9 - v for v in labels]
        assert batch.lags[i].tolist() == lags + [0] * (width - n)
        assert batch.advantages[i] == (t.credit.advantage if t.credit else 0.0)
        if source == "trainer":
            pairs = zip(t.column("trainer"), t.column("engine"), strict=True)
            expected = torch.tensor([a - b for a, b in pairs], dtype=torch.float32).tolist()
            assert batch.mismatch[i].tolist() == expected + padding
        if known:
            assert batch.proximal_logprobs[i].tolist() == t.column("proximal").tolist() + padding


def test_the_mismatch_is_of_the_trainer_over_the_engine():
    row = trajectory((0, [3, 4], [-60.0, -1.0]), trainer=[-60.5, -0.5])
    batch = collate([row], source="trainer")
    assert batch.mismatch.dtype is torch.float32
    assert batch.mismatch[0].tolist() == [-0.5, 0.5]


def test_proximal_logprobs_are_there_only_if_every_trajectory_has_them():
    rows = [trajectory((0, [3] * (i + 1), [-1.0] * (i + 1))) for i in range(2)]
    rows[1].add_logprobs("proximal", [-0.5, -0.25])
    assert collate(rows, source="engine").proximal_logprobs is None
    rows[0].add_logprobs("proximal", [-2.0])
    batch = collate(rows, source="engine")
    assert batch.proximal_logprobs.dtype is torch.float32
    assert batch.proximal_logprobs.tolist() == [[-2.0, 0.0], [-0.5, -0.25]]


@settings(max_examples=100, deadline=None)
@given(trajectories(), st.sampled_from(["engine", "trainer"]), st.data())
def test_some_rows_of_a_batch_are_those_of_the_whole(rows, source, data):
    batch = collate(rows, source=source, policy_version=9, sampling=Sampling(0.7), totals=TOTALS)
    batch.is_last, batch.metrics = True, {"rollout/length": 3.0}
    keep = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    chosen = [i for i, kept in enumerate(keep) if kept]
    some = batch.rows(torch.tensor(keep))
    assert type(some) is MicroBatch
    for field in fields(MicroBatch):
        before, after = getattr(batch, field.name), getattr(some, field.name)
        if field.name == "names":
            assert after == [before[i] for i in chosen]
        elif isinstance(before, torch.Tensor):
            assert torch.equal(after, before[chosen]), field.name
        else:
            assert after == before, field.name
    for name in ("lags", "loss_mask", "response_mask", "attention_mask", "response_positions"):
        assert torch.equal(getattr(some, name), getattr(batch, name)[chosen]), name
    assert len(batch.names) == len(rows)


def test_a_batch_that_is_not_trained_on_has_no_totals_and_no_advantage():
    row = trajectory((0, [3], [-1.0]))
    batch = collate([row], source=None)
    assert batch.totals == NO_TOTALS == UpdateTotals(0, 0, 1)
    assert batch.advantages.tolist() == [0.0]
    assert batch.quarantine_limit == 0


def test_what_is_not_finite_stays_in_its_own_row():
    """A quarantined trajectory travels with its batch, and counts for nothing."""
    good = trajectory((0, [3], [-1.0]), trainer=[-1.5])
    bad = trajectory((0, [3, 4], [math.nan, -1.0]), trainer=[-math.inf, -1.0])
    bad.credit = Credit(0.0, Excluded(bad.fault()))
    batch = collate([good, bad], source="trainer")
    assert batch.loss_mask.tolist() == [[True, False], [False, False]]
    assert batch.mismatch[0].tolist() == [-0.5, 0.0]
    assert torch.isfinite(batch.behavior_logprobs[batch.loss_mask]).all()


def test_a_last_token_equal_to_the_padding_is_still_trained():
    row = trajectory((0, [3, 0], [-1.0, -2.0]), prompt=(0, 0))
    longer = trajectory((0, [4, 5, 6, 7], [-1.0] * 4))
    batch = collate([row, longer], source="engine")
    assert batch.response_mask[0].tolist() == [True, True, False, False]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 1, 0]
    assert batch.behavior_logprobs[0].tolist() == [-1.0, -2.0, 0.0, 0.0]


def test_dtypes_are_those_that_models_take():
    batch = collate([trajectory((0, [3], [-1.0]))], source="engine")
    for name in ("input_ids", "attention_mask", "response_positions", "versions"):
        assert getattr(batch, name).dtype is torch.long, name
    assert batch.behavior_logprobs.dtype is batch.advantages.dtype is torch.float32


def test_unscored_tokens_cannot_be_collated_as_the_trainers():
    row = trajectory((0, [3], [-1.0]))
    with pytest.raises(ValueError, match="none of the trainer's log-probs"):
        collate([row], source="trainer")


def test_a_batch_without_trajectories_or_prompt_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one trajectory"):
        collate([], source=None)
    with pytest.raises(ValueError, match="prompt 'empty' has no tokens"):
        collate([Trajectory(0, 0, "empty", (), 9)], source=None)
