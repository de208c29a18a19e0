"""Sequences are dealt to bins completely, within the limit, and to few bins of like size."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.packing import balance, pack

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def totals(bins, lengths):
    return [sum(lengths[i] for i in bin_) for bin_ in bins]


def deals(lengths, parts):
    """The sums of every way to deal lengths to bins."""
    for places in product(range(parts), repeat=len(lengths)):
        sums = [0] * parts
        for length, place in zip(lengths, places, strict=True):
            sums[place] += length
        yield sums


def fewest(lengths, limit):
    """The least number of bins of at most ``limit``; what is longer stands alone."""
    alone = sum(n > limit for n in lengths)
    rest = [n for n in lengths if n <= limit]
    parts = 0
    while rest and not any(max(sums) <= limit for sums in deals(rest, parts)):
        parts += 1
    return alone + parts


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.data())
def test_a_deal_is_complete_fills_every_part_and_is_balanced(lengths, data):
    parts = data.draw(st.integers(1, len(lengths)))
    bins = balance(lengths, parts)
    assert len(bins) == parts
    assert all(bins)
    assert sorted(i for bin_ in bins for i in bin_) == list(range(len(lengths)))
    sums = totals(bins, lengths)
    assert sums == sorted(sums, reverse=True)
    # Without its last sequence, which went to the cheapest bin, no bin was dearer than any other.
    assert all(
        total - lengths[bin_[-1]] <= sums[-1] for total, bin_ in zip(sums, bins, strict=True)
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_the_dearest_part_costs_at_most_a_third_more_than_in_the_best_of_deals(lengths, parts):
    if parts > len(lengths):
        return
    best = min(max(sums) for sums in deals(lengths, parts))
    assert max(totals(balance(lengths, parts), lengths)) <= (4 / 3 - 1 / (3 * parts)) * best + 1e-9


@pytest.mark.parametrize(("count", "parts"), [(2, 3), (0, 1), (3, 0), (3, -1)])
def test_parts_that_cannot_be_filled_are_refused(count, parts):
    with pytest.raises(ValueError, match=f"{count} trajectories cannot fill {parts}"):
        balance([4] * count, parts)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 4))
def test_passes_are_complete_and_within_the_limit_and_as_many_for_each_rank(lengths, limit, ranks):
    passes = pack(lengths, limit, ranks)
    assert sorted(i for bin_ in passes for i in bin_) == list(range(len(lengths)))
    assert all(passes)
    for bin_, total in zip(passes, totals(passes, lengths), strict=True):
        assert total <= limit or len(bin_) == 1
    assert len(passes) % ranks == 0 or len(passes) == len(lengths)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 40))
def test_passes_are_few(lengths, limit):
    """Never twice as many as there have to be; for lengths like a batch's no more than that."""
    assert len(pack(lengths, limit)) <= max(1, 2 * fewest(lengths, limit) - 1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(45, 450), min_size=64, max_size=256))
def test_passes_over_a_batch_of_responses_are_as_few_as_their_tokens_need(lengths):
    passes = pack(lengths, 4096)
    assert len(passes) <= sum(lengths) / (0.93 * 4096) + 1
    sums = totals(passes, lengths)
    assert max(sums) - min(sums) <= max(lengths)


def test_a_few_short_sequences_are_one_pass_and_none_are_none():
    assert pack([20, 9, 14, 2], 16_384) == [[0, 2, 1, 3]]
    assert pack([], 16_384) == []
    assert pack([20, 9, 14, 2], 16_384, ranks=2) == [[2, 1], [0, 3]]


def test_a_sequence_past_the_limit_stands_alone():
    assert pack([3, 100, 4], 10) == [[1], [2, 0]]
