"""Each normalisation is the mean it is named after, exactly so under any split."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.normalization import (
    NORMALIZATIONS,
    UpdateTotals,
    constant,
    sequence_mean_token_mean,
    sequence_mean_token_sum,
    token_mean,
)

FLOAT = torch.float64
LIMIT = 9


def mean(values):
    return math.fsum(values) / len(values)


DEFINITIONS = {
    token_mean: lambda rows: mean([loss for row in rows for loss in row]),
    sequence_mean_token_mean: lambda rows: mean([mean(row) for row in rows]),
    sequence_mean_token_sum: lambda rows: mean([math.fsum(row) for row in rows]),
    constant: lambda rows: mean([math.fsum(row) / LIMIT for row in rows]),
}
EVERY = pytest.mark.parametrize("normalization", DEFINITIONS, ids=lambda f: f.__name__)
LOSSES = st.floats(-5, 5)
ROWS = st.lists(st.lists(LOSSES, min_size=1, max_size=LIMIT), min_size=1, max_size=8)


def totals_of(rows):
    return UpdateTotals(len(rows), sum(map(len, rows)), LIMIT)


def lengths_of(rows, dtype=FLOAT):
    return torch.tensor([len(row) for row in rows], dtype=dtype)


def weighted(normalization, rows, totals):
    """The sum of w_i times trajectory i's summed losses, over some of the rows."""
    sums = torch.tensor([math.fsum(row) for row in rows], dtype=FLOAT)
    weights = normalization(lengths_of(rows), totals)
    assert weights.shape == (len(rows),)
    assert weights.dtype is FLOAT
    return (weights * sums).sum().item()


@EVERY
@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_the_weighted_sum_is_the_mean_that_the_name_says(normalization, rows):
    actual = weighted(normalization, rows, totals_of(rows))
    assert actual == pytest.approx(DEFINITIONS[normalization](rows), rel=1e-12, abs=1e-12)


@EVERY
@settings(max_examples=60, deadline=None)
@given(rows=ROWS, data=st.data())
def test_any_split_into_micro_batches_adds_up_to_the_whole(normalization, rows, data):
    """Whatever the order, the number of parts and which rows come together."""
    homes = st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))
    assigned = data.draw(homes)
    parts = [[r for r, home in zip(rows, assigned, strict=True) if home == k] for k in range(4)]
    totals = totals_of(rows)
    split = math.fsum(weighted(normalization, part, totals) for part in parts)
    assert split == pytest.approx(weighted(normalization, rows, totals), rel=1e-12, abs=1e-12)


@EVERY
def test_a_trajectory_without_tokens_counts_and_adds_nothing(normalization):
    """Its weight is finite, so that its empty sum of losses stays zero."""
    rows = [[], [2.0, 4.0]]
    expected = {
        token_mean: 3.0,
        sequence_mean_token_mean: 1.5,
        sequence_mean_token_sum: 3.0,
        constant: 3.0 / LIMIT,
    }
    actual = weighted(normalization, rows, totals_of(rows))
    assert actual == pytest.approx(expected[normalization])


@EVERY
def test_a_step_without_anything_to_train_on_has_finite_weights(normalization):
    weights = normalization(lengths_of([[1.0], []]), UpdateTotals(0, 0, LIMIT))
    assert torch.isfinite(weights).all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.long, torch.int32])
def test_integer_lengths_get_floating_weights(normalization, dtype):
    rows = [[1.0], [1.0] * 3]
    weights = normalization(lengths_of(rows, dtype), totals_of(rows))
    assert weights.dtype is torch.get_default_dtype()
    expected = normalization(lengths_of(rows), totals_of(rows))
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)


def test_weights_of_known_lengths():
    lengths, totals = torch.tensor([1.0, 3.0]), UpdateTotals(4, 10, 8)
    assert token_mean(lengths, totals).tolist() == pytest.approx([0.1, 0.1])
    assert sequence_mean_token_mean(lengths, totals).tolist() == pytest.approx([1 / 4, 1 / 12])
    assert sequence_mean_token_sum(lengths, totals).tolist() == [0.25, 0.25]
    assert constant(lengths, totals).tolist() == [1 / 32, 1 / 32]


def test_every_normalisation_has_its_own_name():
    assert {name: f.__name__ for name, f in NORMALIZATIONS.items()} == {
        name: name for name in NORMALIZATIONS
    }
    assert set(NORMALIZATIONS.values()) == set(DEFINITIONS)
