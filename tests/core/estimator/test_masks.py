"""What does not count moves nothing: not the loss, not a gradient, not a flag."""

import math
from dataclasses import fields

import torch
from estimates import COMBINATIONS, ESTIMATORS, NAMES, fixed_rows, gradients, rows, terms_of
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.corrections import LagRejection
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.losses import CispoLoss, ClippedPolicyLoss
from copris_lightning.core.estimator.ratios import SequenceRatio, TokenRatio, TokenTerms

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
    estimator = Estimator(loss, ratio)
    quiet, quiet_gradient, _ = gradients(estimator, terms_of(rows))
    for value in LOUD:
        for token in (token for _, row in rows for token in row if not token["mask"]):
            token.update(dict.fromkeys(NAMES[:6], value))
        loud, gradient, _ = gradients(estimator, terms_of(rows))
        assert torch.equal(loud.loss, quiet.loss)
        assert torch.equal(gradient, quiet_gradient)


def test_what_a_correction_leaves_out_changes_nothing_elsewhere():
    rows = fixed_rows(2, 4)
    terms = terms_of(rows)
    kept = terms.lags <= 1
    plain, plain_gradient, _ = gradients(Estimator(), terms)
    some, gradient, _ = gradients(Estimator(corrections=[LagRejection(1)]), terms)
    assert (plain.loss != 0)[terms.mask].all()
    assert torch.equal(some.loss, torch.where(kept, plain.loss, 0.0))
    assert torch.equal(gradient, torch.where(kept, plain_gradient, 0.0))


@COMBINATIONS
def test_no_flag_is_raised_outside_the_mask(loss, ratio):
    """Also where the tokens that do not count share the ratio of those that do."""
    rows = fixed_rows(4, 3)
    for i, (_, row) in enumerate(rows):
        for token in row:
            token["logprobs"] = token["behavior_logprobs"] + (-3.0 if i % 4 < 2 else 4.0)
    estimate = Estimator(loss, ratio)(terms_of(rows))
    for flag in (estimate.clipped_low, estimate.clipped_high):
        assert not flag[~estimate.mask].any()
    bounded = (ClippedPolicyLoss, CispoLoss)
    if isinstance(ratio, TokenRatio | SequenceRatio) and isinstance(loss, bounded):
        assert (estimate.clipped_low | estimate.clipped_high).any()
