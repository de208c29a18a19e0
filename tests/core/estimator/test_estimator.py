"""The whole estimator against a loop in plain floats, what it reports and what it refuses."""

import math
from dataclasses import fields, replace

import pytest
import torch
from estimates import (
    COMBINATIONS,
    CORRECTIONS,
    ESTIMATORS,
    LOSSES,
    RATIOS,
    assert_follows,
    fixed_rows,
    gradients,
    oracle_ratio,
    rows,
    terms_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.corrections import LagRejection, Masking, Truncation
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.losses import ClippedPolicyLoss
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.core.estimator.ratios import DecoupledRatio, TokenRatio


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
        estimator = Estimator(loss, ratio, **extra)
        assert_follows(estimator, fixed_rows(3, 5, seed=seed))


@pytest.mark.parametrize("loss", LOSSES[:2], ids=repr)
@pytest.mark.parametrize("ratio", RATIOS[:5], ids=repr)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_autograd_agrees_with_finite_differences(loss, ratio, kl):
    """Where the weights do not depend on the current policy, so that nothing is detached."""
    rows = fixed_rows(2, 4)
    corrections = [Truncation(5.0), Masking(0.1, None, "policy", "sequence"), LagRejection(1)]
    estimator = Estimator(loss, ratio, corrections, KLPenalty(0.5, kl), 0.3)
    terms = terms_of(rows)
    assert torch.autograd.gradcheck(
        lambda p, h: estimator(terms_of(rows, logprobs=p, entropy=h)).loss,
        (terms.logprobs, terms.entropy),
    )


# ---------------------------------------------------------------- what is reported


def test_everything_reported_is_detached_and_of_the_batchs_shape():
    rows = fixed_rows(2, 4)
    terms = terms_of(rows)
    terms.behavior_logprobs.requires_grad_()
    for ratio in RATIOS:
        estimator = Estimator(LOSSES[0], ratio, CORRECTIONS, KLPenalty(), 0.1)
        estimate = estimator(terms)
        for field in fields(estimate):
            values = getattr(estimate, field.name)
            for value in values.values() if field.name == "corrections" else [values]:
                assert value.shape == terms.mask.shape
                assert value.requires_grad == (field.name == "loss"), field.name


@settings(max_examples=40, deadline=None)
@given(rows(), st.sampled_from(RATIOS))
def test_the_figures_are_those_of_the_tokens_that_count(rows, ratio):
    estimator = Estimator(ratio=ratio, kl=KLPenalty(0.1, "k2"))
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


def test_what_was_not_given_is_not_reported():
    terms = replace(
        terms_of(fixed_rows()),
        mismatch=None,
        entropy=None,
        proximal_logprobs=None,
        reference_logprobs=None,
    )
    estimate = Estimator()(terms)
    assert estimate.mismatch is estimate.mismatch_kl is None
    assert estimate.reference_kl is estimate.entropy is None
    assert estimate.corrections == {}


@pytest.mark.parametrize(
    ("estimator", "missing", "message"),
    [
        (Estimator(kl=KLPenalty()), "reference_logprobs", "no reference log-probs"),
        (Estimator(entropy_coefficient=0.1), "entropy", "entropy was not computed"),
        (Estimator(ratio=DecoupledRatio()), "proximal_logprobs", "not recomputed"),
        (Estimator(corrections=[Truncation()]), "mismatch", "not at hand"),
    ],
)
def test_what_is_needed_and_missing_is_named(estimator, missing, message):
    with pytest.raises(AssertionError, match=message):
        estimator(replace(terms_of(fixed_rows()), **{missing: None}))


def test_an_entropy_without_a_coefficient_is_reported_and_pulls_nowhere():
    terms = terms_of(fixed_rows())
    estimate, _, by_entropy = gradients(Estimator(), terms)
    assert torch.equal(estimate.entropy, torch.where(terms.mask, terms.entropy, 0.0))
    assert not by_entropy.any()


def test_an_estimator_knows_what_it_needs():
    assert not Estimator().needs_mismatch
    assert not Estimator().needs_proximal
    assert Estimator(ratio=DecoupledRatio()).needs_proximal
    assert not Estimator(ratio=DecoupledRatio("loglinear")).needs_proximal
    policy = Masking(ratio="policy")
    assert not Estimator(corrections=[policy, LagRejection()]).needs_mismatch
    assert Estimator(corrections=[policy, Truncation(apply=False)]).needs_mismatch


def test_by_default_it_is_copris():
    assert Estimator() == Estimator(ClippedPolicyLoss(0.2, 0.28, 10.0), TokenRatio())


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_negative_entropy_coefficient_is_refused(value):
    with pytest.raises(
        ValueError, match=f"entropy_coefficient={value} must be a number of at least 0"
    ):
        Estimator(entropy_coefficient=value)


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
        Estimator(corrections=pair)


def test_the_mismatch_ratio_is_multiplied_only_once():
    twice = [Truncation(), Masking(reweigh=True)]
    names = "truncation_token and masking_mismatch_token would multiply"
    with pytest.raises(ValueError, match=names):
        Estimator(corrections=twice)
    with pytest.raises(ValueError, match="truncation_sequence and truncation_token"):
        Estimator(corrections=[Truncation(level="sequence"), Truncation()])
    Estimator(corrections=[Truncation(apply=False), Masking(reweigh=True)])
    Estimator(corrections=[Truncation(), Masking(reweigh=True, apply=False)])
    Estimator(corrections=[Truncation(), Masking(reweigh=False), LagRejection()])
