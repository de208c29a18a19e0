"""Importance ratios against loops in plain floats, their gradients, and what they share."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import trajectory

from copris_lightning.core.batching import collate
from copris_lightning.core.estimator.ratios import (
    MAX_LOG_RATIO,
    DecoupledRatio,
    SequenceRatio,
    TokenRatio,
    TokenTerms,
    UncorrectedRatio,
    clamp_log_ratio,
    loglinear_proximal,
)
from copris_lightning.errors import ConfigurationError

FLOAT = torch.float64


def tensor(values, dtype=FLOAT):
    return torch.tensor(values, dtype=dtype)


def clamped(x):
    """The bound of the log-ratio, and whether x lies within it (and so has a gradient)."""
    return max(-20.0, min(20.0, x)), -20.0 <= x <= 20.0


NEAR = st.floats(-6, 0)
FAR = st.sampled_from([-1e4, 1e4, -25.0, -0.0]) | st.floats(-1e4, 1e4)
SUMMABLE = st.one_of(NEAR, NEAR, NEAR, FAR)
FINITE = SUMMABLE | st.just(-1e30)  # which takes every other term of a sum with it


@st.composite
def rows(draw, values=FINITE, infinite=True):
    """Rows of tokens ``(now, behaviour, proximal, lag, counts)``, as nested lists.

    At most one of current and behaviour is -inf in a row, as both would have no ratio.
    """
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def one_row():
        nothing = draw(st.sampled_from([None, None, "now", "behavior"])) if infinite else None
        absent = st.just(-math.inf)
        now = values | absent if nothing == "now" else values
        behavior = values | absent if nothing == "behavior" else values
        token = st.tuples(now, behavior, values, st.integers(0, 6), st.booleans())
        return draw(st.lists(token, min_size=width, max_size=width))

    return [one_row() for _ in range(batch)]


def terms_of(rows, lag_type=FLOAT, **changed):
    now, behavior, proximal, lags, mask = (
        [[token[i] for token in row] for row in rows] for i in range(5)
    )
    fields = {
        "logprobs": tensor(now).requires_grad_(),
        "behavior_logprobs": tensor(behavior),
        "proximal_logprobs": tensor(proximal),
        "lags": tensor(lags, lag_type),
        "mask": tensor(mask, torch.bool),
        "advantages": torch.ones(len(rows), 1, dtype=FLOAT),
    }
    return TokenTerms(**{**fields, **changed})


def slopes_of(log_ratio, terms):
    """``[B, R, R]``: of the log-ratio of token t by the log-prob of token s of its row."""
    slopes = torch.zeros(*log_ratio.shape, log_ratio.shape[1], dtype=FLOAT)
    for t in range(log_ratio.shape[1]):
        (gradient,) = torch.autograd.grad(
            log_ratio[:, t].sum(), terms.logprobs, retain_graph=True, materialize_grads=True
        )
        slopes[:, t] = gradient
    return slopes


def check(ratio, rows, expected):
    """``expected(row)`` gives a pair per token, log-ratio and weight, and slopes ``[R][R]``."""
    terms = terms_of(rows)
    log_ratio, weight = ratio(terms)
    assert log_ratio.shape == weight.shape == terms.mask.shape
    assert log_ratio.dtype is weight.dtype is FLOAT
    assert not weight.requires_grad
    slopes = slopes_of(log_ratio, terms)
    for i, row in enumerate(rows):
        pairs, by_token = expected(row)
        for t, (token, (log, factor)) in enumerate(zip(row, pairs, strict=True)):
            if token[-1]:
                assert log_ratio[i, t].item() == pytest.approx(log, rel=1e-10, abs=1e-10)
                assert weight[i, t].item() == pytest.approx(factor, rel=1e-10, abs=1e-300)
                assert slopes[i, t].tolist() == pytest.approx(by_token[t], abs=1e-12)


def diagonal(values):
    return [[v if s == t else 0.0 for s in range(len(values))] for t, v in enumerate(values)]


@settings(max_examples=60, deadline=None)
@given(rows())
def test_the_token_ratio_compares_each_token_with_the_policy_that_made_it(rows):
    def expected(row):
        logs = [clamped(now - behavior) for now, behavior, *_ in row]
        return [(log, 1.0) for log, _ in logs], diagonal([float(free) for _, free in logs])

    check(TokenRatio(), rows, expected)


@pytest.mark.parametrize("length_normalized", [True, False])
@settings(max_examples=60, deadline=None)
@given(rows=rows(SUMMABLE))
def test_the_sequence_ratio_is_the_product_over_the_response_or_its_geometric_mean(
    rows, length_normalized
):
    def expected(row):
        differences = [now - behavior for now, behavior, _, _, counts in row if counts]
        n = len(differences) if length_normalized and differences else 1
        log, free = clamped(sum(differences) / n)
        slopes = [1 / n if free and counts else 0.0 for *_, counts in row]
        return [(log, 1.0)] * len(row), [slopes] * len(row)

    check(SequenceRatio(length_normalized), rows, expected)


@settings(max_examples=60, deadline=None)
@given(rows(), st.none() | st.floats(0.1, 30))
def test_the_decoupled_ratio_splits_into_a_ratio_and_a_constant_weight(rows, max_weight):
    """The proximal policy's log-probs are finite; those on either side of it need not be."""

    def expected(row):
        logs = [clamped(now - proximal) for now, _, proximal, _, _ in row]
        weights = [math.exp(clamped(proximal - behavior)[0]) for _, behavior, proximal, _, _ in row]
        if max_weight is not None:
            weights = [min(weight, max_weight) for weight in weights]
        pairs = [(log, weight) for (log, _), weight in zip(logs, weights, strict=True)]
        return pairs, diagonal([float(free) for _, free in logs])

    check(DecoupledRatio("recompute", max_weight), rows, expected)


@settings(max_examples=60, deadline=None)
@given(rows(NEAR, infinite=False), st.none() | st.floats(0.1, 30))
def test_the_loglinear_proximal_policy_is_interpolated_by_version(rows, max_weight):
    """A token of version v is d/(d + 1) of the way from v to the current policy."""

    def expected(row):
        pairs, slopes = [], []
        for now, behavior, _, lag, _ in row:
            proximal = behavior / (lag + 1) + now * lag / (lag + 1)
            weight = math.exp(proximal - behavior)
            pairs.append(
                (now - proximal, weight if max_weight is None else min(weight, max_weight))
            )
            slopes.append(1.0)  # the proximal policy is a constant
        return pairs, diagonal(slopes)

    check(DecoupledRatio("loglinear", max_weight), rows, expected)


@settings(max_examples=30, deadline=None)
@given(rows(infinite=False))
def test_without_correction_the_ratio_is_one_and_the_gradient_that_of_the_logprob(rows):
    check(
        UncorrectedRatio(),
        rows,
        lambda row: ([(0.0, 1.0)] * len(row), diagonal([1.0] * len(row))),
    )


@pytest.mark.parametrize("lag_type", [torch.long, torch.int32, FLOAT])
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(FINITE, FINITE, st.integers(0, 9) | st.just(10**6)), min_size=1, max_size=6
    )
)
def test_loglinear_interpolation_lies_between_behaviour_and_current(tokens, lag_type):
    now, behavior, lags = zip(*tokens, strict=True)
    actual = loglinear_proximal(tensor(now), tensor(behavior), tensor(lags, lag_type))
    assert actual.dtype is FLOAT
    # Lags are integers, whose quotient is of default precision.
    precision = 1e-13 if lag_type is FLOAT else 1e-6
    for value, current, old, lag in zip(actual.tolist(), now, behavior, lags, strict=True):
        expected = (old + lag * current) / (lag + 1)
        assert value == pytest.approx(expected, rel=0, abs=precision * (abs(old) + abs(current)))
        if lag == 0:
            assert value == old


@settings(max_examples=60, deadline=None)
@given(NEAR, NEAR)
def test_loglinear_interpolation_goes_from_behaviour_to_current_as_the_lag_grows(now, behavior):
    lags = torch.arange(0, 1000, 50, dtype=FLOAT)
    size = len(lags)
    values = loglinear_proximal(tensor([now] * size), tensor([behavior] * size), lags)
    distance = (values - now).abs()
    assert values[0] == behavior
    assert (distance.diff() <= 1e-12).all()
    assert distance[-1] <= 1.1e-3 * abs(now - behavior) + 1e-12


def test_a_token_without_lag_has_weight_one_and_the_token_ratio():
    tokens = [[(-1.0, -2.5, 0.0, 0, True), (-1.0, -2.5, 0.0, 1, True)]]
    log_ratio, weight = DecoupledRatio("loglinear")(terms_of(tokens))
    assert log_ratio[0].tolist() == [1.5, 0.75]
    assert weight[0].tolist() == [1.0, pytest.approx(math.exp(0.75))]


def test_only_recomputation_needs_proximal_logprobs():
    assert DecoupledRatio("recompute").needs_proximal
    ratios = [DecoupledRatio("loglinear"), TokenRatio(), SequenceRatio(), UncorrectedRatio()]
    assert not any(ratio.needs_proximal for ratio in ratios)
    tokens = [[(-1.0, -2.5, 0.0, 0, True)]]
    for ratio in ratios:
        ratio(terms_of(tokens, proximal_logprobs=None))
    with pytest.raises(AssertionError, match="not recomputed"):
        DecoupledRatio("recompute")(terms_of(tokens, proximal_logprobs=None))


@settings(max_examples=60, deadline=None)
@given(st.tuples(FINITE, FINITE), st.integers(0, 3), st.integers(0, 3))
def test_the_sequence_ratio_of_one_token_is_the_token_ratio(token, before, after):
    """Whatever the padding says, on both sides."""
    padding = (-3.0, 7.0, 0.0, 0, False)
    tokens = [[*[padding] * before, (*token, 0.0, 0, True), *[padding] * after]]
    expected = TokenRatio()(terms_of(tokens)).log_ratio[0, before]
    for length_normalized in (True, False):
        actual = SequenceRatio(length_normalized)(terms_of(tokens)).log_ratio[0, before]
        assert actual == expected


RATIOS = [
    TokenRatio(),
    SequenceRatio(),
    SequenceRatio(length_normalized=False),
    DecoupledRatio("recompute"),
    DecoupledRatio("recompute", None),
]


@pytest.mark.parametrize("ratio", RATIOS, ids=repr)
def test_autograd_agrees_with_finite_differences(ratio):
    tokens = [
        [(-1.0, -1.5, -1.2, 0, True), (-0.3, -2.0, -0.9, 2, True), (-4.0, -3.0, -3.3, 1, False)],
        [(-2.0, -1.5, -2.2, 0, True), (-30.0, -2.0, -1.0, 2, False), (-0.1, -5.0, -0.2, 1, True)],
    ]
    terms = terms_of(tokens)
    assert torch.autograd.gradcheck(
        lambda x: ratio(terms_of(tokens, logprobs=x)).log_ratio, (terms.logprobs,)
    )


@pytest.mark.parametrize("ratio", [*RATIOS, DecoupledRatio("loglinear"), UncorrectedRatio()])
def test_on_policy_every_ratio_is_one(ratio):
    tokens = [[(p, p, p, i, i < 3) for i, p in enumerate((-1.0, -2.5, -0.1, -9.0))]]
    log_ratio, weight = ratio(terms_of(tokens))
    assert torch.equal(log_ratio, torch.zeros_like(log_ratio))
    assert torch.equal(weight, torch.ones_like(weight))


def test_each_token_is_compared_with_the_version_that_made_it():
    """Two versions wrote the response; under each the ratio is to that version's log-probs."""
    chunks = [(3, [5, 6], [-9.0] * 2), (5, [7], [-9.0])]
    row = trajectory(*chunks, trainer=[-1.0, -2.0, -0.5])
    batch = collate([row], source="trainer", policy_version=5)

    def ratio(logprobs):
        return TokenRatio()(
            TokenTerms(
                logprobs=torch.tensor([logprobs]),
                behavior_logprobs=batch.behavior_logprobs,
                advantages=batch.advantages[:, None],
                mask=batch.loss_mask,
                lags=batch.lags,
            )
        ).log_ratio.exp()

    first = ratio([-1.5, -2.0, -0.1])
    torch.testing.assert_close(first, torch.tensor([[-0.5, 0.0, 0.4]]).exp())
    assert (ratio([-1.5, -1.7, -0.1]) == first).tolist() == [[True, False, True]]


@settings(max_examples=40, deadline=None)
@given(st.floats(allow_nan=False))
def test_log_ratios_are_clamped_to_twenty(value):
    assert MAX_LOG_RATIO == 20.0
    assert clamp_log_ratio(tensor([value])).item() == clamped(value)[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_terms_are_zero_outside_whatever_stood_there(value):
    """And the gradient there is zero, not NaN."""
    mask = torch.tensor([[True, False], [False, False]])
    names = ["logprobs", "behavior_logprobs", "mismatch", "proximal_logprobs"]
    names += ["reference_logprobs", "entropy"]
    values = {n: tensor([[-1.5, value], [value, value]]).requires_grad_() for n in names}
    terms = TokenTerms(
        **values,
        mask=mask,
        lags=torch.tensor([[3, -1], [-1, 10**9]]),
        advantages=tensor([[-2.0], [value]]),
    ).masked()
    for name in names:
        assert torch.equal(getattr(terms, name), tensor([[-1.5, 0.0], [0.0, 0.0]])), name
    assert torch.equal(terms.advantages, tensor([[-2.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(terms.lags, torch.tensor([[3, 0], [0, 0]]))
    assert torch.equal(terms.mask, mask)
    (terms.logprobs.square() + terms.entropy.square()).sum().backward()
    for name in ("logprobs", "entropy"):
        assert torch.equal(values[name].grad, tensor([[-3.0, 0.0], [0.0, 0.0]]))
    assert not terms.behavior_logprobs.requires_grad


def test_what_is_not_known_stays_unknown_when_masked():
    mask = torch.ones(1, 1, dtype=torch.bool)
    zero = torch.zeros(1, 1)
    terms = TokenTerms(zero, zero, zero, mask, torch.zeros(1, 1, dtype=torch.long)).masked()
    assert terms.mismatch is terms.proximal_logprobs is terms.reference_logprobs is None
    assert terms.entropy is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proximal": "guess"}, "proximal='guess' must be recompute or loglinear"),
        ({"max_weight": 0.0}, "max_weight=0.0 must be above 0"),
        ({"max_weight": -1.0}, "max_weight=-1.0"),
        ({"max_weight": math.nan}, "max_weight=nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        DecoupledRatio(**arguments)
