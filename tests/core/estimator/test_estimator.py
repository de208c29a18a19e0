"""The whole estimator against a loop in plain floats, and the identities that the papers state."""

import math
from dataclasses import fields, replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.batching import collate
from copris_lightning.core.estimator.advantage import grpo
from copris_lightning.core.estimator.corrections import LagRejection, Masking, Truncation
from copris_lightning.core.estimator.estimator import PolicyGradient
from copris_lightning.core.estimator.losses import CispoLoss, ClippedPolicyLoss, ReinforceLoss
from copris_lightning.core.estimator.normalization import NORMALIZATIONS, UpdateTotals
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.core.estimator.ratios import (
    DecoupledRatio,
    SequenceRatio,
    TokenRatio,
    TokenTerms,
    UncorrectedRatio,
)
from copris_lightning.core.outcome import Credit, Verdict
from copris_lightning.core.trajectory import Trajectory

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


# ---------------------------------------------------------------- the formula, token by token


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
    PolicyGradient,
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


@settings(max_examples=100, deadline=None)
@given(ESTIMATORS, rows())
def test_loss_and_gradient_follow_the_formula(estimator, rows):
    assert_follows(estimator, rows)


@COMBINATIONS
def test_every_loss_over_every_ratio_follows_the_formula(loss, ratio):
    everything = {
        "corrections": CORRECTIONS,
        "kl": KLPenalty(0.2, "k2"),
        "entropy_coefficient": 0.1,
    }
    for seed, extra in enumerate([{}, everything]):
        estimator = PolicyGradient(loss, ratio, **extra)
        assert_follows(estimator, fixed_rows(3, 5, seed=seed))


@pytest.mark.parametrize("loss", LOSSES[:2], ids=repr)
@pytest.mark.parametrize("ratio", RATIOS[:5], ids=repr)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_autograd_agrees_with_finite_differences(loss, ratio, kl):
    """Where the weights do not depend on the current policy, so that nothing is detached."""
    rows = fixed_rows(2, 4)
    corrections = [Truncation(5.0), Masking(0.1, None, "policy", "sequence"), LagRejection(1)]
    estimator = PolicyGradient(loss, ratio, corrections, KLPenalty(0.5, kl), 0.3)
    terms = terms_of(rows)
    assert torch.autograd.gradcheck(
        lambda p, h: estimator(terms_of(rows, logprobs=p, entropy=h)).loss,
        (terms.logprobs, terms.entropy),
    )


# ---------------------------------------------------------------- identities


@COMBINATIONS
def test_on_policy_the_gradient_is_the_plain_policy_gradient(loss, ratio):
    """-A for each token that counts; the product over a sequence moves with each of its n."""
    rows = fixed_rows(3, 4, on_policy=True)
    terms = terms_of(rows)
    estimate, gradient, _ = gradients(PolicyGradient(loss, ratio), terms)
    expected = torch.where(terms.mask, -terms.advantages, 0.0)
    if isinstance(loss, ClippedPolicyLoss) and ratio == SequenceRatio(length_normalized=False):
        expected = expected * terms.mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert (estimate.ratio == 1).all()
    assert not (estimate.clipped_low | estimate.clipped_high).any()
    assert not estimate.behavior_kl.any()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_at_the_proximal_policy_the_decoupled_gradient_is_weighted_by_its_staleness(loss):
    rows = fixed_rows(3, 4)
    terms = terms_of(rows)
    proximal = terms.logprobs.detach()
    weight = (proximal - terms.behavior_logprobs).exp().clamp(max=1.05)
    terms = replace(terms, proximal_logprobs=proximal)
    _, gradient, _ = gradients(PolicyGradient(loss, DecoupledRatio("recompute", 1.05)), terms)
    expected = torch.where(terms.mask, -weight * terms.advantages, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def respond(sample, chunks, reward, *, limit=10):
    """A trajectory from ``(log-probs, version)`` chunks, finished and rewarded."""
    trajectory = Trajectory(0, sample, "p", (1, 2), limit)
    for logprobs, version in chunks:
        trajectory.append([3] * len(logprobs), logprobs, version)
    trajectory.finish("stop")
    trajectory.judge(Verdict(reward))
    return trajectory


def terms_from(batch, logprobs, **changed):
    """As the module makes them, in double."""
    values = {
        "logprobs": logprobs,
        "behavior_logprobs": batch.behavior_logprobs.double(),
        "advantages": batch.advantages.double()[:, None],
        "mask": batch.loss_mask,
        "lags": batch.lags,
        "entropy": torch.zeros_like(logprobs),
    }
    return TokenTerms(**{**values, **changed})


LOGPROBS = st.floats(-3, 0, width=32)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_with_one_version_per_trajectory_copris_is_grpo(data):
    """GRPO's objective as in its paper, equation 3, over one group of G outputs."""
    rewards = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=4))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=len(rewards), max_size=len(rewards)))
    olds = [data.draw(st.lists(LOGPROBS, min_size=n, max_size=n)) for n in lengths]
    news = [data.draw(st.lists(LOGPROBS, min_size=n, max_size=n)) for n in lengths]
    group = [respond(i, [(o, i)], r) for i, (o, r) in enumerate(zip(olds, rewards, strict=True))]
    for trajectory, advantage in zip(group, grpo(tensor([rewards]))[0].tolist(), strict=True):
        trajectory.credit = Credit(advantage)
    totals = UpdateTotals(len(group), sum(lengths), 10)
    batch = collate(group, source="engine", policy_version=9, totals=totals)
    width = max(lengths)
    logprobs = tensor([new + [0.0] * (width - len(new)) for new in news])
    estimator = PolicyGradient(
        ClippedPolicyLoss(0.2, 0.2, None), kl=KLPenalty(coefficient=0.04, estimator="k3")
    )
    reference = torch.full_like(logprobs, -1.0)
    loss = estimator(terms_from(batch, logprobs, reference_logprobs=reference)).loss
    weights = NORMALIZATIONS["sequence_mean_token_mean"](batch.response_lengths.double(), totals)
    actual = (loss.sum(dim=1) * weights).sum().item()

    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    objective = 0.0
    for reward, old, new in zip(rewards, olds, news, strict=True):
        advantage = (reward - mean) / (deviation + 1e-6)
        inner = 0.0
        for before, now in zip(old, new, strict=True):
            r = math.exp(now - before)
            clipped = min(max(r, 1 - 0.2), 1 + 0.2)
            divergence = math.exp(-1.0 - now) - (-1.0 - now) - 1
            inner += min(r * advantage, clipped * advantage) - 0.04 * divergence
        objective += inner / len(old)
    assert actual == pytest.approx(-objective / len(rewards), rel=1e-6, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.data(), ESTIMATORS)
def test_cutting_a_segment_without_a_new_version_changes_nothing(data, estimator):
    """A partial rollout that goes on under the same weights is an uninterrupted one."""
    n = data.draw(st.integers(2, 6))
    old, engine, now, other = (
        data.draw(st.lists(LOGPROBS, min_size=n, max_size=n)) for _ in range(4)
    )
    first = data.draw(st.integers(0, n - 1))
    cut = data.draw(st.integers(first, n))
    whole = [(engine[:first], 4), (engine[first:], 6)]
    parts = [(engine[:first], 4), (engine[first:cut], 6), (engine[cut:], 6)]
    results = []
    for chunks in (whole, parts):
        trajectory = respond(0, chunks, 1.0)
        trajectory.credit = Credit(-0.7)
        trajectory.add_logprobs("trainer", old)
        trajectory.add_logprobs("proximal", other)
        batch = collate([trajectory], source="trainer", policy_version=7)
        logprobs = tensor([now]).requires_grad_()
        terms = terms_from(
            batch,
            logprobs,
            mismatch=batch.mismatch.double(),
            proximal_logprobs=batch.proximal_logprobs.double(),
            reference_logprobs=tensor([other]),
        )
        loss = estimator(terms).loss
        loss.sum().backward()
        results.append((loss.detach(), logprobs.grad, batch.lags))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_change_of_version_is_a_change_of_lag():
    same, changed = (
        collate([respond(0, [([-1.0], 4), ([-1.0], v)], 1.0)], source="engine", policy_version=7)
        for v in (4, 6)
    )
    assert same.lags.tolist() == [[3, 3]]
    assert changed.lags.tolist() == [[3, 1]]


LOUD = [math.nan, math.inf, -math.inf, 1e300]


@settings(max_examples=40, deadline=None)
@given(ESTIMATORS, rows(), st.sampled_from(LOUD))
def test_nothing_outside_the_mask_is_ever_looked_at(estimator, rows, value):
    """Bit for bit the same loss and gradient as with zeros there."""
    results = []
    for filler in (0.0, value):
        terms = terms_of(rows)
        empty = ~terms.mask.any(dim=1, keepdim=True)
        filled = {}
        for field in fields(terms):
            values = getattr(terms, field.name)
            if field.name == "advantages":
                values = torch.where(empty, filler, values)
            elif field.name == "lags":
                values = torch.where(terms.mask, values, -1.0 if filler else 0.0)
            elif field.name != "mask":
                values = torch.where(terms.mask, values.detach(), filler)
            filled[field.name] = values
        for name in ("logprobs", "entropy"):
            filled[name].requires_grad_()
        results.append(gradients(estimator, TokenTerms(**filled)))
    (quiet, *quiet_slopes), (loud, *loud_slopes) = results
    for ours, theirs in zip(loud_slopes, quiet_slopes, strict=True):
        assert torch.equal(ours, theirs)
        assert not ours[~loud.mask].any()
    assert not loud.loss[~loud.mask].any()
    for field in fields(loud):
        ours, theirs = getattr(loud, field.name), getattr(quiet, field.name)
        if field.name == "corrections":
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        else:
            assert ours is theirs is None or torch.equal(ours, theirs), field.name


@COMBINATIONS
def test_every_combination_ignores_what_is_masked(loss, ratio):
    rows = fixed_rows(2, 4)
    rows[0][1][1]["mask"] = False
    estimator = PolicyGradient(loss, ratio)
    quiet, quiet_gradient, _ = gradients(estimator, terms_of(rows))
    for value in LOUD:
        for token in (token for _, row in rows for token in row if not token["mask"]):
            token.update(dict.fromkeys(NAMES[:6], value))
        loud, gradient, _ = gradients(estimator, terms_of(rows))
        assert torch.equal(loud.loss, quiet.loss)
        assert torch.equal(gradient, quiet_gradient)


@COMBINATIONS
def test_corrections_that_only_measure_leave_the_loss_exactly_as_it_is(loss, ratio):
    terms = terms_of(fixed_rows(3, 4))
    measured = [
        Truncation(1.01, apply=False),
        Masking(1.0, 1.0, reweigh=True, apply=False),
        LagRejection(0, apply=False),
    ]
    plain, plain_gradient, _ = gradients(PolicyGradient(loss, ratio), terms)
    with_metrics, gradient, _ = gradients(PolicyGradient(loss, ratio, measured), terms)
    assert torch.equal(with_metrics.loss, plain.loss)
    assert torch.equal(gradient, plain_gradient)
    own = ["decoupled"] if isinstance(ratio, DecoupledRatio) else []
    assert list(plain.corrections) == own
    assert list(with_metrics.corrections) == own + [c.name for c in measured]
    for correction in measured:
        reported = with_metrics.corrections[correction.name]
        assert torch.equal(reported, correction(terms.masked()))
        assert not (reported[terms.mask] == 1).all()


@COMBINATIONS
def test_truncation_out_of_reach_multiplies_by_the_plain_mismatch_ratio(loss, ratio):
    terms = terms_of(fixed_rows(3, 4))
    plain, plain_gradient, _ = gradients(PolicyGradient(loss, ratio), terms)
    estimate, gradient, _ = gradients(PolicyGradient(loss, ratio, [Truncation(1e9)]), terms)
    weight = terms.mismatch.exp()
    if not isinstance(ratio, SequenceRatio):  # there a token moves the loss of its neighbours
        torch.testing.assert_close(gradient, weight * plain_gradient)
    torch.testing.assert_close(estimate.loss, torch.where(terms.mask, weight, 0.0) * plain.loss)


def test_mismatch_times_policy_ratio_is_the_ratio_to_the_engine():
    """pi / trainer times trainer / engine: what importance sampling from the engine asks for."""
    rows = fixed_rows(3, 4)
    trainer = terms_of(rows)
    engine = replace(trainer, behavior_logprobs=trainer.behavior_logprobs - trainer.mismatch)
    loss = ReinforceLoss(None)
    two, gradient, _ = gradients(PolicyGradient(loss, corrections=[Truncation(1e9)]), trainer)
    one, expected, _ = gradients(PolicyGradient(loss), engine)
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("length_normalized", [True, False])
def test_the_sequence_ratio_of_single_tokens_is_the_token_ratio(loss, length_normalized):
    rows = fixed_rows(3, 1)
    ours = gradients(PolicyGradient(loss, SequenceRatio(length_normalized)), terms_of(rows))
    theirs = gradients(PolicyGradient(loss, TokenRatio()), terms_of(rows))
    assert torch.equal(ours[0].loss, theirs[0].loss)
    assert torch.equal(ours[1], theirs[1])


@settings(max_examples=40, deadline=None)
@given(rows(), st.sampled_from(LOSSES))
def test_without_correction_the_behaviour_has_no_influence(rows, loss):
    estimator = PolicyGradient(loss, UncorrectedRatio())
    terms = terms_of(rows)
    estimate, gradient, _ = gradients(estimator, terms)
    assert torch.equal(gradient, torch.where(terms.mask, -terms.advantages, 0.0))
    other = replace(terms, behavior_logprobs=terms.behavior_logprobs * 3 - 1)
    assert torch.equal(estimator(other).loss, estimate.loss)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("ratio", RATIOS, ids=repr)
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(normalization, ratio):
    """Although a correction leaves tokens out, and a trajectory is left out altogether."""
    estimator = PolicyGradient(
        ratio=ratio,
        corrections=[Masking(0.95, 1.1), LagRejection(1)],
        kl=KLPenalty(0.1),
        entropy_coefficient=0.2,
    )
    rows = fixed_rows(6, 5, seed=3)
    for token in rows[2][1]:
        token["mask"] = False
    included = [row for _, row in rows if any(token["mask"] for token in row)]
    tokens = sum(token["mask"] for row in included for token in row)
    totals = UpdateTotals(len(included), tokens, 8)

    def share(part):
        terms = terms_of(part)
        lengths = terms.mask.sum(dim=1).to(FLOAT)
        loss = estimator(terms).loss.sum(dim=1)
        total = (loss * NORMALIZATIONS[normalization](lengths, totals)).sum()
        return total, torch.autograd.grad(total, (terms.logprobs, terms.entropy))

    whole, slopes = share(rows)
    for cuts in ([0, 1, 6], [0, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]):
        parts = [share(rows[a:b]) for a, b in pairwise(cuts)]
        assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-12)
        for i, slope in enumerate(slopes):
            together = torch.cat([gradient[i] for _, gradient in parts])
            torch.testing.assert_close(together, slope, rtol=1e-12, atol=1e-15)


def test_what_a_correction_leaves_out_changes_nothing_elsewhere():
    rows = fixed_rows(2, 4)
    terms = terms_of(rows)
    kept = terms.lags <= 1
    plain, plain_gradient, _ = gradients(PolicyGradient(), terms)
    some, gradient, _ = gradients(PolicyGradient(corrections=[LagRejection(1)]), terms)
    assert (plain.loss != 0)[terms.mask].all()
    assert torch.equal(some.loss, torch.where(kept, plain.loss, 0.0))
    assert torch.equal(gradient, torch.where(kept, plain_gradient, 0.0))


WIDE = ClippedPolicyLoss(0.999999, 1e6, None)


@pytest.mark.parametrize(
    ("loss", "normalization"),
    [(WIDE, "sequence_mean_token_mean"), (ReinforceLoss(None), "sequence_mean_token_sum")],
    ids=["surrogate", "reinforce"],
)
def test_the_product_over_a_sequence_has_an_unbiased_policy_gradient(loss, normalization):
    """Enumerated: responses of one or two tokens, the second made under a later version."""
    generator = torch.Generator().manual_seed(1)
    theta = torch.randn(2, 3, generator=generator, dtype=FLOAT).requires_grad_()
    versions = torch.randn(2, 2, 3, generator=generator, dtype=FLOAT).log_softmax(-1)
    policy = theta.log_softmax(-1)  # of the first token, and of the second
    # Token 0 ends the response.
    responses = [(0,), *product((1, 2), (0, 1, 2))]
    score = {response: float(i * i) - 3.0 for i, response in enumerate(responses)}
    value, estimated = 0.0, 0.0
    for response in responses:
        now = torch.stack([policy[t, token] for t, token in enumerate(response)])
        behavior = torch.stack([versions[t, t, token] for t, token in enumerate(response)])
        value = value + score[response] * now.sum().exp()
        size = (1, len(response))
        terms = TokenTerms(
            now[None],
            behavior[None],
            tensor([[score[response]]]),
            torch.ones(size, dtype=torch.bool),
            torch.zeros(size, dtype=torch.long),
        )
        estimate = PolicyGradient(loss, SequenceRatio(length_normalized=False))(terms)
        weight = NORMALIZATIONS[normalization](tensor([len(response)]), UpdateTotals(1, 1, 2))
        estimated = estimated + behavior.sum().exp() * weight * estimate.loss.sum()
    (wanted,) = torch.autograd.grad(value, theta, retain_graph=True)
    (actual,) = torch.autograd.grad(estimated, theta)
    torch.testing.assert_close(-actual, wanted, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- what is reported


def test_everything_reported_is_detached_and_of_the_batchs_shape():
    rows = fixed_rows(2, 4)
    terms = terms_of(rows)
    terms.behavior_logprobs.requires_grad_()
    for ratio in RATIOS:
        estimator = PolicyGradient(LOSSES[0], ratio, CORRECTIONS, KLPenalty(), 0.1)
        estimate = estimator(terms)
        for field in fields(estimate):
            values = getattr(estimate, field.name)
            for value in values.values() if field.name == "corrections" else [values]:
                assert value.shape == terms.mask.shape
                assert value.requires_grad == (field.name == "loss"), field.name


@settings(max_examples=40, deadline=None)
@given(rows(), st.sampled_from(RATIOS))
def test_the_figures_are_those_of_the_tokens_that_count(rows, ratio):
    estimator = PolicyGradient(ratio=ratio, kl=KLPenalty(0.1, "k2"))
    estimate = estimator(terms_of(rows))
    for i, (advantage, row) in enumerate(rows):
        counting = [t for t, token in enumerate(row) if token["mask"]]
        ratios = oracle_ratio(ratio, [row[t] for t in counting]) if counting else []
        for t, (log, weight, _) in zip(counting, ratios, strict=True):
            now, behavior = row[t]["logprobs"], row[t]["behavior_logprobs"]
            x, m, r = now - behavior, row[t]["mismatch"], math.exp(log)
            expected = {
                "ratio": r,
                "behavior_kl": math.exp(x) - 1 - x,
                "mismatch": m,
                "mismatch_kl": math.exp(m) - 1 - m,
                "reference_kl": (now - row[t]["reference_logprobs"]) ** 2 / 2,
                "entropy": row[t]["entropy"],
                "lags": row[t]["lags"],
                "clipped_low": advantage < 0 and r < 0.8,
                "clipped_high": (advantage > 0 and r > 1.28) or (advantage < 0 and r > 10),
            }
            for name, value in expected.items():
                actual = getattr(estimate, name)[i, t].item()
                assert actual == pytest.approx(value, rel=1e-9, abs=1e-12), name
            if isinstance(ratio, DecoupledRatio):
                actual = estimate.corrections["decoupled"][i, t].item()
                assert actual == pytest.approx(weight, rel=1e-9)
    for flag in (estimate.clipped_low, estimate.clipped_high):
        assert not flag[~estimate.mask].any()


@COMBINATIONS
def test_no_flag_is_raised_outside_the_mask(loss, ratio):
    """Also where the tokens that do not count share the ratio of those that do."""
    rows = fixed_rows(4, 3)
    for i, (_, row) in enumerate(rows):
        for token in row:
            token["logprobs"] = token["behavior_logprobs"] + (-3.0 if i % 4 < 2 else 4.0)
    estimate = PolicyGradient(loss, ratio)(terms_of(rows))
    for flag in (estimate.clipped_low, estimate.clipped_high):
        assert not flag[~estimate.mask].any()
    bounded = (ClippedPolicyLoss, CispoLoss)
    if isinstance(ratio, TokenRatio | SequenceRatio) and isinstance(loss, bounded):
        assert (estimate.clipped_low | estimate.clipped_high).any()


def test_what_was_not_given_is_not_reported():
    terms = replace(
        terms_of(fixed_rows()),
        mismatch=None,
        entropy=None,
        proximal_logprobs=None,
        reference_logprobs=None,
    )
    estimate = PolicyGradient()(terms)
    assert estimate.mismatch is estimate.mismatch_kl is None
    assert estimate.reference_kl is estimate.entropy is None
    assert estimate.corrections == {}


@pytest.mark.parametrize(
    ("estimator", "missing", "message"),
    [
        (PolicyGradient(kl=KLPenalty()), "reference_logprobs", "no reference log-probs"),
        (PolicyGradient(entropy_coefficient=0.1), "entropy", "entropy was not computed"),
        (PolicyGradient(ratio=DecoupledRatio()), "proximal_logprobs", "not recomputed"),
        (PolicyGradient(corrections=[Truncation()]), "mismatch", "not at hand"),
    ],
)
def test_what_is_needed_and_missing_is_named(estimator, missing, message):
    with pytest.raises(AssertionError, match=message):
        estimator(replace(terms_of(fixed_rows()), **{missing: None}))


def test_an_entropy_without_a_coefficient_is_reported_and_pulls_nowhere():
    terms = terms_of(fixed_rows())
    estimate, _, by_entropy = gradients(PolicyGradient(), terms)
    assert torch.equal(estimate.entropy, torch.where(terms.mask, terms.entropy, 0.0))
    assert not by_entropy.any()


def test_an_estimator_knows_what_it_needs():
    assert not PolicyGradient().needs_mismatch
    assert not PolicyGradient().needs_proximal
    assert PolicyGradient(ratio=DecoupledRatio()).needs_proximal
    assert not PolicyGradient(ratio=DecoupledRatio("loglinear")).needs_proximal
    policy = Masking(ratio="policy")
    assert not PolicyGradient(corrections=[policy, LagRejection()]).needs_mismatch
    assert PolicyGradient(corrections=[policy, Truncation(apply=False)]).needs_mismatch


def test_by_default_it_is_copris():
    assert PolicyGradient() == PolicyGradient(ClippedPolicyLoss(0.2, 0.28, 10.0), TokenRatio())


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_negative_entropy_coefficient_is_refused(value):
    with pytest.raises(
        ValueError, match=f"entropy_coefficient={value} must be a number of at least 0"
    ):
        PolicyGradient(entropy_coefficient=value)


@pytest.mark.parametrize(
    "pair",
    [
        (Truncation(), Truncation(3.0)),
        (Masking(), Masking(0.1, 9.0)),
        (LagRejection(1), LagRejection(2, apply=False)),
    ],
)
def test_a_correction_listed_twice_is_refused(pair):
    with pytest.raises(ValueError, match=f"{pair[0].name} is listed twice"):
        PolicyGradient(corrections=pair)


def test_the_mismatch_ratio_is_multiplied_only_once():
    twice = [Truncation(), Masking(reweigh=True)]
    names = "truncation_token and masking_mismatch_token would multiply"
    with pytest.raises(ValueError, match=names):
        PolicyGradient(corrections=twice)
    with pytest.raises(ValueError, match="truncation_sequence and truncation_token"):
        PolicyGradient(corrections=[Truncation(level="sequence"), Truncation()])
    PolicyGradient(corrections=[Truncation(apply=False), Masking(reweigh=True)])
    PolicyGradient(corrections=[Truncation(), Masking(reweigh=True, apply=False)])
    PolicyGradient(corrections=[Truncation(), Masking(reweigh=False), LagRejection()])
