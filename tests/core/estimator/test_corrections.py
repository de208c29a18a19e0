"""Corrections against loops in plain floats, at every level, also where a quotient is absurd."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.corrections import (
    LagRejection,
    Masking,
    Truncation,
    effective_sample_share,
)
from copris_lightning.core.estimator.ratios import TokenTerms
from copris_lightning.errors import ConfigurationError

FLOAT = torch.float64
LEVELS = ("token", "sequence", "geometric")


def tensor(values, dtype=FLOAT):
    return torch.tensor(values, dtype=dtype)


NEAR = st.floats(-1.5, 1.5)
FAR = st.sampled_from([-1e4, 1e4, -25.0, 0.0]) | st.floats(-1e4, 1e4)
LOGS = st.one_of(NEAR, NEAR, NEAR, FAR)
"""Of a quotient: mismatch, or current minus behaviour."""


@st.composite
def rows(draw):
    """Rows of ``(mismatch, policy, advantage, lag, counts)``; one quotient of a row may be 0."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    advantages = st.sampled_from([0.0, -1.0, 1.0]) | st.floats(-2, 2)
    result = []
    for _ in range(batch):
        logs = LOGS | st.just(-math.inf) if draw(st.integers(0, 4)) == 0 else LOGS
        token = st.tuples(logs, logs, advantages, st.integers(0, 8), st.booleans())
        result.append(draw(st.lists(token, min_size=width, max_size=width)))
    return result


def terms_of(rows):
    mismatch, policy, advantages, lags, mask = (
        [[token[i] for token in row] for row in rows] for i in range(5)
    )
    behavior = tensor([[-(i % 3) - 0.5 for i in range(len(row))] for row in rows])
    return TokenTerms(
        logprobs=(behavior + tensor(policy)).requires_grad_(),
        behavior_logprobs=behavior,
        advantages=tensor(advantages),
        mask=tensor(mask, torch.bool),
        lags=tensor(lags, torch.long),
        mismatch=tensor(mismatch).requires_grad_(),
    )


def quotients(row, which, level):
    """The quotient that each token of a row goes by; tokens that do not count have no say."""
    logs = [token[which] for token in row]
    counting = [log for log, token in zip(logs, row, strict=True) if token[-1]]
    if level != "token":
        log = sum(counting) / (len(counting) if level == "geometric" and counting else 1)
        logs = [log] * len(row)
    return [math.exp(max(-20.0, min(20.0, log))) for log in logs]


def check(correction, rows, expected):
    """``expected(row)`` gives the weight of each token of a row."""
    terms = terms_of(rows)
    weights = correction(terms)
    assert weights.shape == terms.mask.shape
    assert weights.dtype is FLOAT
    assert not weights.requires_grad
    for i, row in enumerate(rows):
        for t, (token, weight) in enumerate(zip(row, expected(row), strict=True)):
            if token[-1]:
                assert weights[i, t].item() == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=60, deadline=None)
@given(rows=rows(), limit=st.floats(0.1, 20) | st.just(1e9))
def test_truncation_bounds_the_mismatch_from_above(rows, limit, level):
    def expected(row):
        return [min(k, limit) for k in quotients(row, 0, level)]

    check(Truncation(limit, level), rows, expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("ratio", "reweigh"), [("mismatch", False), ("mismatch", True), ("policy", False)]
)
@settings(max_examples=40, deadline=None)
@given(
    rows=rows(),
    low=st.floats(0, 1.5),
    width=st.none() | st.floats(0, 5),
    negative_only=st.booleans(),
)
def test_masking_keeps_what_lies_in_the_interval(
    rows, low, width, negative_only, ratio, reweigh, level
):
    high = None if width is None else low + width
    which = 0 if ratio == "mismatch" else 1
    bounds = [low] if high is None else [low, high]
    assume(
        all(
            abs(k - bound) > 1e-9
            for row in rows
            for k in quotients(row, which, level)
            for bound in bounds
        )
    )

    def expected(row):
        weights = []
        for k, (_, _, advantage, _, _) in zip(quotients(row, which, level), row, strict=True):
            inside = low <= k and (high is None or k <= high)
            spared = negative_only and advantage >= 0
            weights.append((k if reweigh else 1.0) if inside or spared else 0.0)
        return weights

    check(Masking(low, high, ratio, level, reweigh, negative_only), rows, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
@settings(max_examples=60, deadline=None)
@given(rows=rows(), limit=st.integers(0, 8))
def test_lag_rejection_leaves_out_stale_tokens_or_whole_responses(rows, limit, level):
    def expected(row):
        stalest = max((lag for *_, lag, counts in row if counts), default=0)
        lags = [stalest if level == "sequence" else lag for *_, lag, _ in row]
        return [float(lag <= limit) for lag in lags]

    check(LagRejection(limit, level), rows, expected)


def one_row(mismatch=(0.0,), policy=(0.0,), advantages=(1.0,), lags=(0,)):
    size = max(map(len, (mismatch, policy, advantages, lags)))
    columns = [c if len(c) == size else c * size for c in (mismatch, policy, advantages, lags)]
    return terms_of([[(*token, True) for token in zip(*columns, strict=True)]])


def test_truncation_of_known_quotients():
    terms = one_row(mismatch=(math.log(4.0), math.log(0.5), 0.0))
    assert Truncation(2.0)(terms)[0].tolist() == pytest.approx([2.0, 0.5, 1.0])
    assert Truncation(3.0, "sequence")(terms)[0].tolist() == pytest.approx([2.0] * 3)
    geometric = Truncation(3.0, "geometric")(terms)[0].tolist()
    assert geometric == pytest.approx([2 ** (1 / 3)] * 3)


@pytest.mark.parametrize("ratio", ["mismatch", "policy"])
@pytest.mark.parametrize("level", LEVELS)
def test_both_ends_of_the_interval_are_kept(ratio, level):
    for low, high in [(1.0, 1.0), (1.0, None), (0.0, 1.0)]:
        assert Masking(low, high, ratio, level)(one_row()).tolist() == [[1.0]]
    assert Masking(1.001, None, ratio, level)(one_row()).tolist() == [[0.0]]
    assert Masking(0.0, 0.999, ratio, level)(one_row()).tolist() == [[0.0]]


def test_masking_for_negative_advantages_spares_zero_and_positive_ones():
    terms = one_row(policy=(-3.0,), advantages=(-1.0, 0.0, 1.0))
    weights = Masking(0.5, None, "policy", "token", negative_only=True)(terms)
    assert weights.tolist() == [[0.0, 1.0, 1.0]]
    assert not Masking(0.5, None, "policy", "token")(terms).any()


def test_mismatch_and_policy_are_told_apart():
    terms = one_row(mismatch=(3.0, 0.0), policy=(0.0, 3.0))
    assert Masking(ratio="mismatch")(terms).tolist() == [[0.0, 1.0]]
    assert Masking(ratio="policy")(terms).tolist() == [[1.0, 0.0]]


def test_lag_rejection_keeps_the_largest_lag_allowed():
    terms = one_row(lags=(0, 4, 5))
    assert LagRejection(4)(terms).tolist() == [[1.0, 1.0, 0.0]]
    assert LagRejection(4, "sequence")(terms).tolist() == [[0.0, 0.0, 0.0]]
    assert LagRejection(5, "sequence")(terms).tolist() == [[1.0, 1.0, 1.0]]
    assert LagRejection(0)(terms).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("log", [math.inf, -math.inf, 1e30, -1e30])
def test_weights_stay_finite_in_single_precision(log, level):
    terms = one_row(mismatch=(log,), policy=(log,), advantages=(-1.0,))
    for name in ("logprobs", "behavior_logprobs", "advantages", "mismatch"):
        setattr(terms, name, getattr(terms, name).detach().float())
    limit = math.exp(20.0) if log > 0 else math.exp(-20.0)
    for correction in (Truncation(1e12, level), Masking(0.0, None, level=level, reweigh=True)):
        weights = correction(terms)
        assert weights.dtype is torch.float32
        assert weights.item() == pytest.approx(limit, rel=1e-5)
    assert Masking(level=level, ratio="policy")(terms).item() == 0.0


def test_what_a_correction_needs_and_how_it_is_called():
    assert Truncation().needs_mismatch
    assert Truncation().reweighs
    assert Masking().needs_mismatch
    assert not Masking(ratio="policy").needs_mismatch
    assert Masking(reweigh=True).reweighs
    assert not Masking().reweighs
    assert not LagRejection().needs_mismatch
    assert not LagRejection().reweighs
    assert Truncation(level="geometric").name == "truncation_geometric"
    assert Masking(ratio="policy", level="sequence").name == "masking_policy_sequence"
    assert LagRejection().name == "lag_rejection_token"
    assert all(c.apply for c in (Truncation(), Masking(), LagRejection()))


def test_only_what_needs_the_mismatch_asks_for_it():
    terms = one_row()
    terms.mismatch = None
    for correction in (Masking(ratio="policy"), LagRejection(), LagRejection(level="sequence")):
        assert correction(terms).item() == 1.0
    for correction in (Truncation(), Masking()):
        with pytest.raises(AssertionError, match="not at hand"):
            correction(terms)


def test_the_trainers_probability_is_the_numerator():
    """More probable under the trainer than under the engine: the engine made it too seldom."""
    assert Truncation(10.0)(one_row(mismatch=(math.log(3.0),))).item() == pytest.approx(3.0)


WEIGHTS = st.floats(0, 10) | st.floats(0, 5e8) | st.sampled_from([0.0, math.exp(-20)])


@settings(max_examples=100, deadline=None)
@given(st.lists(WEIGHTS, min_size=1, max_size=20))
def test_the_effective_sample_share_is_kishs(weights):
    total, squares = math.fsum(weights), math.fsum(w * w for w in weights)
    share = effective_sample_share(total, squares, len(weights))
    if squares < 1e-290:
        assert 0.0 <= share <= 1.0
        return
    mean = total / len(weights)
    spread = math.fsum((w - mean) ** 2 for w in weights) / len(weights)
    # Of equal mean, the more unequal the weights the smaller the share.
    assert share == pytest.approx(mean**2 / (mean**2 + spread), rel=1e-9)
    assert 0.0 < share <= 1.0 + 1e-12


def test_the_effective_sample_share_of_known_weights():
    for weights, share in [
        ([3.0] * 5, 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25),
        ([1.0, 1.0, 0.0, 0.0], 0.5),
        ([1.0, 3.0], 0.8),
        ([0.0, 0.0], 0.0),
    ]:
        squares = sum(w * w for w in weights)
        result = effective_sample_share(sum(weights), squares, len(weights))
        assert result == pytest.approx(share)


@pytest.mark.parametrize(
    ("correction", "arguments", "message"),
    [
        (Truncation, {"max_weight": 0.0}, "max_weight=0.0 must be above 0"),
        (Truncation, {"max_weight": math.nan}, "max_weight=nan"),
        (Truncation, {"level": "row"}, "level='row' must be token, sequence or geometric"),
        (Masking, {"level": "row"}, "level='row' must be token, sequence or geometric"),
        (Masking, {"ratio": "kl"}, "ratio='kl' must be mismatch or policy"),
        (Masking, {"low": -0.1}, "low=-0.1 and high=5.0 must be 0 <= low <= high"),
        (Masking, {"low": 2.0, "high": 1.0}, "low=2.0 and high=1.0 must be"),
        (Masking, {"low": math.nan}, "low=nan"),
        (Masking, {"high": math.nan}, "low=0.5 and high=nan"),
        (Masking, {"ratio": "policy", "reweigh": True}, "reweigh=true needs ratio=mismatch"),
        (LagRejection, {"level": "geometric"}, "level='geometric' must be token or sequence"),
        (LagRejection, {"max_lag": -1}, "max_lag=-1 must be at least 0"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(correction, arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        correction(**arguments)
