"""The identities that the papers state, for every loss over every ratio."""

import math
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from estimates import (
    COMBINATIONS,
    ESTIMATORS,
    FLOAT,
    LOSSES,
    RATIOS,
    fixed_rows,
    gradients,
    rows,
    tensor,
    terms_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.batching import collate
from copris_lightning.core.estimator.advantage import grpo
from copris_lightning.core.estimator.corrections import LagRejection, Masking, Truncation
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.losses import ClippedPolicyLoss, ReinforceLoss
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


@COMBINATIONS
def test_on_policy_the_gradient_is_the_plain_policy_gradient(loss, ratio):
    """-A for each token that counts; the product over a sequence moves with each of its n."""
    rows = fixed_rows(3, 4, on_policy=True)
    terms = terms_of(rows)
    estimate, gradient, _ = gradients(Estimator(loss, ratio), terms)
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
    _, gradient, _ = gradients(Estimator(loss, DecoupledRatio("recompute", 1.05)), terms)
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
    estimator = Estimator(
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


@COMBINATIONS
def test_corrections_that_only_measure_leave_the_loss_exactly_as_it_is(loss, ratio):
    terms = terms_of(fixed_rows(3, 4))
    measured = [
        Truncation(1.01, apply=False),
        Masking(1.0, 1.0, reweigh=True, apply=False),
        LagRejection(0, apply=False),
    ]
    plain, plain_gradient, _ = gradients(Estimator(loss, ratio), terms)
    with_metrics, gradient, _ = gradients(Estimator(loss, ratio, measured), terms)
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
    plain, plain_gradient, _ = gradients(Estimator(loss, ratio), terms)
    estimate, gradient, _ = gradients(Estimator(loss, ratio, [Truncation(1e9)]), terms)
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
    two, gradient, _ = gradients(Estimator(loss, corrections=[Truncation(1e9)]), trainer)
    one, expected, _ = gradients(Estimator(loss), engine)
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("length_normalized", [True, False])
def test_the_sequence_ratio_of_single_tokens_is_the_token_ratio(loss, length_normalized):
    rows = fixed_rows(3, 1)
    ours = gradients(Estimator(loss, SequenceRatio(length_normalized)), terms_of(rows))
    theirs = gradients(Estimator(loss, TokenRatio()), terms_of(rows))
    assert torch.equal(ours[0].loss, theirs[0].loss)
    assert torch.equal(ours[1], theirs[1])


@settings(max_examples=40, deadline=None)
@given(rows(), st.sampled_from(LOSSES))
def test_without_correction_the_behaviour_has_no_influence(rows, loss):
    estimator = Estimator(loss, UncorrectedRatio())
    terms = terms_of(rows)
    estimate, gradient, _ = gradients(estimator, terms)
    assert torch.equal(gradient, torch.where(terms.mask, -terms.advantages, 0.0))
    other = replace(terms, behavior_logprobs=terms.behavior_logprobs * 3 - 1)
    assert torch.equal(estimator(other).loss, estimate.loss)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("ratio", RATIOS, ids=repr)
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(normalization, ratio):
    """Although a correction leaves tokens out, and a trajectory is left out altogether."""
    estimator = Estimator(
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
        estimate = Estimator(loss, SequenceRatio(length_normalized=False))(terms)
        weight = NORMALIZATIONS[normalization](tensor([len(response)]), UpdateTotals(1, 1, 2))
        estimated = estimated + behavior.sum().exp() * weight * estimate.loss.sum()
    (wanted,) = torch.autograd.grad(value, theta, retain_graph=True)
    (actual,) = torch.autograd.grad(estimated, theta)
    torch.testing.assert_close(-actual, wanted, rtol=1e-10, atol=1e-12)
