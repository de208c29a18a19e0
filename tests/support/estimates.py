"""Small tensors for the estimator, and its formula in plain floats."""

import math
from itertools import product

import pytest
import torch
from hypothesis import strategies as st

from copris_lightning.core.estimator.corrections import LagRejection, Masking, Truncation
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.losses import CispoLoss, ClippedPolicyLoss, ReinforceLoss
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.core.estimator.ratios import (
    DecoupledRatio,
    SequenceRatio,
    TokenRatio,
    TokenTerms,
    UncorrectedRatio,
)

FLOAT = torch.float64
RATIOS = [
    TokenRatio(),
    SequenceRatio(),
    SequenceRatio(length_normalized=False),
    DecoupledRatio("recompute"),
    DecoupledRatio("recompute", None),
    DecoupledRatio("loglinear"),
    UncorrectedRatio(),
]
LOSSES = [
    ClippedPolicyLoss(),
    ClippedPolicyLoss(0.5, 1.0, None),
    CispoLoss(),
    CispoLoss(0.3, 0.5),
    ReinforceLoss(),
    ReinforceLoss(None),
]
CORRECTIONS = [
    Truncation(),
    Truncation(1.5, "sequence", apply=False),
    Masking(0.8, 1.3, "policy", "geometric", negative_only=True),
    Masking(0.7, 1.6, "mismatch", "token"),
    LagRejection(2),
    LagRejection(3, "sequence"),
]
COMBINATIONS = pytest.mark.parametrize(
    ("loss", "ratio"), list(product([LOSSES[0], LOSSES[3], LOSSES[4]], RATIOS)), ids=repr
)


def tensor(values, dtype=FLOAT):
    return torch.tensor(values, dtype=dtype)


NAMES = ("logprobs", "behavior_logprobs", "proximal_logprobs", "reference_logprobs")
NAMES += ("mismatch", "entropy", "lags", "mask")


@st.composite
def rows(draw):
    """``[(advantage, tokens)]``, each token a dict by the names of :class:`TokenTerms`."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    near, small = st.floats(-4, 0), st.floats(-1.5, 1.5)

    def token():
        behavior = draw(near)
        values = [behavior + draw(small), behavior, behavior + draw(small), draw(near)]
        values += [draw(small), draw(st.floats(0, 3)), draw(st.integers(0, 5)), draw(st.booleans())]
        return dict(zip(NAMES, values, strict=True))

    advantages = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(0.01, 2) | st.floats(-2, -0.01)
    return [(draw(advantages), [token() for _ in range(width)]) for _ in range(batch)]


def terms_of(rows, **changed):
    kinds = {"mask": torch.bool}
    values = {
        name: tensor([[token[name] for token in row] for _, row in rows], kinds.get(name, FLOAT))
        for name in NAMES
    }
    values["advantages"] = tensor([[advantage] for advantage, _ in rows])
    values["logprobs"].requires_grad_()
    values["entropy"].requires_grad_()
    return TokenTerms(**{**values, **changed})


def fixed_rows(batch=2, width=4, *, seed=0, on_policy=False):
    """Rows away from any bound, so that nothing depends on rounding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand((), generator=generator, dtype=FLOAT).item()

    result = []
    for i in range(batch):
        row = []
        for t in range(width):
            behavior = draw(-4.0, -0.5)
            now = behavior if on_policy else behavior + draw(-0.15, 0.15)
            proximal = behavior if on_policy else behavior + draw(-0.1, 0.1)
            values = [now, behavior, proximal, now + draw(-1.0, 1.0), draw(-0.2, 0.2), draw(0, 3)]
            row.append(dict(zip(NAMES, [*values, t % 3, (i + t) % 4 != 3], strict=True)))
        result.append((draw(0.5, 2.0) * (-1) ** i, row))
    return result


def gradients(estimator, terms):
    """The estimate, and the gradients of its summed loss by log-prob and by entropy."""
    estimate = estimator(terms)
    slopes = torch.autograd.grad(
        estimate.loss.sum(),
        (terms.logprobs, terms.entropy),
        materialize_grads=True,
        allow_unused=True,
    )
    return estimate, *slopes


def oracle_ratio(ratio, tokens):
    """Log-ratio, weight and slope by each log-prob of the tokens that count, all of one row."""
    n = len(tokens)
    one = [[float(s == t) for s in range(n)] for t in range(n)]
    if isinstance(ratio, SequenceRatio):
        share = n if ratio.length_normalized else 1
        log = sum(t["logprobs"] - t["behavior_logprobs"] for t in tokens) / share
        assert abs(log) < 20
        return [(log, 1.0, [1 / share] * n)] * n
    result = []
    for token, slopes in zip(tokens, one, strict=True):
        now, behavior, lag = token["logprobs"], token["behavior_logprobs"], token["lags"]
        if isinstance(ratio, TokenRatio):
            result.append((now - behavior, 1.0, slopes))
        elif isinstance(ratio, UncorrectedRatio):
            result.append((0.0, 1.0, slopes))
        else:
            loglinear = (behavior + lag * now) / (lag + 1)
            proximal = loglinear if ratio.proximal == "loglinear" else token["proximal_logprobs"]
            weight = math.exp(proximal - behavior)
            result.append((now - proximal, min(weight, ratio.max_weight or math.inf), slopes))
    return result


def oracle_loss(loss, log_ratio, logprob, advantage):
    """Loss, slope by the log-ratio and slope by the log-prob."""
    r = math.exp(log_ratio)
    if isinstance(loss, ReinforceLoss):
        weight = min(r, math.inf if loss.max_weight is None else loss.max_weight)
        return -weight * advantage * logprob, 0.0, -weight * advantage
    low, high = 1 - loss.clip_low, 1 + loss.clip_high
    if isinstance(loss, CispoLoss):
        weight = min(max(r, low), high)
        return -weight * advantage * logprob, 0.0, -weight * advantage
    if advantage >= 0:
        value, moves = min(r, high), r <= high
    else:
        top = loss.dual_clip or math.inf
        value, moves = min(max(r, low), top), low <= r <= top
    return -advantage * value, -advantage * r if moves else 0.0, 0.0


def oracle_correction(correction, tokens, advantage):
    lags = [t["lags"] for t in tokens]
    if isinstance(correction, LagRejection):
        lags = [max(lags)] * len(lags) if correction.level == "sequence" else lags
        return [float(lag <= correction.max_lag) for lag in lags]
    if isinstance(correction, Masking) and correction.ratio == "policy":
        logs = [t["logprobs"] - t["behavior_logprobs"] for t in tokens]
    else:
        logs = [t["mismatch"] for t in tokens]
    if correction.level != "token":
        share = len(logs) if correction.level == "geometric" else 1
        logs = [sum(logs) / share] * len(logs)
    ratios = [math.exp(log) for log in logs]
    if isinstance(correction, Truncation):
        return [min(k, correction.max_weight) for k in ratios]
    kept = [correction.low <= k <= correction.high for k in ratios]
    if correction.negative_only and advantage >= 0:
        kept = [True] * len(kept)
    return [float(k) for k in kept]


def oracle_penalty(kl, now, reference):
    """The penalty's estimate and its slope by the log-prob."""
    x = reference - now
    if kl.estimator == "k1":
        return -x, 1.0
    if kl.estimator == "k2":
        return x * x / 2, -x
    return math.exp(x) - 1 - x, 1 - math.exp(x)


def oracle(estimator, advantage, row):
    """Loss of each token of a row, and the gradients of their sum by log-prob and by entropy."""
    size = len(row)
    counting = [t for t in range(size) if row[t]["mask"]]
    tokens = [row[t] for t in counting]
    losses, by_logprob, by_entropy = ([0.0] * size for _ in range(3))
    weights = [1.0] * len(tokens)
    for correction in estimator.corrections:
        if tokens and correction.apply:
            factors = oracle_correction(correction, tokens, advantage)
            weights = [w * f for w, f in zip(weights, factors, strict=True)]
    ratios = oracle_ratio(estimator.ratio, tokens) if tokens else []
    for i, (log, factor, slopes) in enumerate(ratios):
        token, t = tokens[i], counting[i]
        value, by_log, direct = oracle_loss(estimator.loss, log, token["logprobs"], advantage)
        weight = weights[i] * factor
        losses[t] += weight * value
        by_logprob[t] += weight * direct
        for j, slope in enumerate(slopes):
            by_logprob[counting[j]] += weight * by_log * slope
        if estimator.kl is not None:
            penalty, slope = oracle_penalty(
                estimator.kl, token["logprobs"], token["reference_logprobs"]
            )
            losses[t] += estimator.kl.coefficient * penalty
            by_logprob[t] += estimator.kl.coefficient * slope
        losses[t] -= estimator.entropy_coefficient * token["entropy"]
        by_entropy[t] -= estimator.entropy_coefficient
    return losses, by_logprob, by_entropy


ESTIMATORS = st.builds(
    Estimator,
    loss=st.sampled_from(LOSSES),
    ratio=st.sampled_from(RATIOS),
    corrections=st.lists(st.sampled_from(CORRECTIONS), unique_by=lambda c: c.name, max_size=3),
    kl=st.none() | st.builds(KLPenalty, st.floats(0.01, 2), st.sampled_from(["k1", "k2", "k3"])),
    entropy_coefficient=st.sampled_from([0.0, 0.3]),
)


def assert_follows(estimator, rows):
    estimate, by_logprob, by_entropy = gradients(estimator, terms_of(rows))
    for i, (advantage, row) in enumerate(rows):
        expected = oracle(estimator, advantage, row)
        actual = estimate.loss[i], by_logprob[i], by_entropy[i]
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.tolist() == pytest.approx(theirs, rel=1e-9, abs=1e-11)
