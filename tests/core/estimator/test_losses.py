"""The losses against loops in plain floats, and identities that do not need one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.losses import CispoLoss, ClippedPolicyLoss, ReinforceLoss
from copris_lightning.errors import ConfigurationError


def tensor(values, *, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def oracle(config, log_ratio, logprob, advantage):
    """Loss, slope by the log-ratio, slope by the log-prob and the two flags of one token."""
    r = math.exp(log_ratio)
    if isinstance(config, CispoLoss):
        low, high = 1 - config.clip_low, 1 + config.clip_high
        weight = low if r < low else high if r > high else r
        slope = -weight * advantage
        return slope * logprob, 0.0, slope, r < low, r > high
    if isinstance(config, ReinforceLoss):
        weight = r if config.max_weight is None else min(r, config.max_weight)
        slope = -weight * advantage
        return slope * logprob, 0.0, slope, False, weight < r
    low, high = 1 - config.clip_low, 1 + config.clip_high
    bound = math.inf if config.dual_clip is None else config.dual_clip
    if advantage >= 0:  # -A min(r, high): only too large a ratio is clipped
        over = advantage > 0 and r > high
        return -advantage * min(r, high), 0.0 if over else -advantage * r, 0.0, False, over
    under, over = r < low, r > bound  # |A| max(r, low), and no more than |A| c
    loss = -advantage * min(max(r, low), bound)
    return loss, 0.0 if under or over else -advantage * r, 0.0, under, over


CLIPPED = st.builds(
    ClippedPolicyLoss,
    clip_low=st.floats(0.01, 0.99),
    clip_high=st.floats(0.01, 3.0),
    dual_clip=st.none() | st.floats(1.01, 20.0),
)
CISPO = st.builds(CispoLoss, clip_low=st.floats(0.01, 1.0), clip_high=st.floats(0.01, 5.0))
REINFORCE = st.builds(ReinforceLoss, max_weight=st.none() | st.floats(0.1, 20.0))
CONFIGS = CLIPPED | CISPO | REINFORCE
LOG_RATIOS = st.floats(-3, 3) | st.floats(-20, 20) | st.sampled_from([-20.0, 0.0, 20.0])
LOGPROBS = st.floats(-5, 0) | st.floats(-1e4, 0)
ADVANTAGES = st.floats(1e-3, 3) | st.floats(-3, -1e-3) | st.just(0.0)
TOKENS = st.lists(st.tuples(LOG_RATIOS, LOGPROBS, ADVANTAGES), min_size=1, max_size=8)
EVERY = pytest.mark.parametrize(
    "config",
    [ClippedPolicyLoss(), ClippedPolicyLoss(dual_clip=None), CispoLoss(), ReinforceLoss()],
    ids=["clipped", "clipped without dual", "cispo", "reinforce"],
)


def evaluate(config, tokens):
    """The loss's parts, and its gradients by log-ratio and by log-prob, ``[1, tokens]`` each."""
    log_ratio, logprobs, advantages = (tensor([row]) for row in zip(*tokens, strict=True))
    log_ratio.requires_grad_()
    logprobs.requires_grad_()
    parts = config(log_ratio, logprobs, advantages)
    slopes = torch.autograd.grad(
        parts.loss.sum(), (log_ratio, logprobs), materialize_grads=True, allow_unused=True
    )
    return parts, *slopes


@settings(max_examples=150, deadline=None)
@given(CONFIGS, TOKENS)
def test_loss_gradients_and_flags_follow_the_formula(config, tokens):
    parts, by_ratio, by_logprob = evaluate(config, tokens)
    for i, token in enumerate(tokens):
        loss, ratio_slope, logprob_slope, low, high = oracle(config, *token)
        assert parts.loss[0, i].item() == pytest.approx(loss, rel=1e-12, abs=1e-300)
        assert by_ratio[0, i].item() == pytest.approx(ratio_slope, rel=1e-12, abs=1e-300)
        assert by_logprob[0, i].item() == pytest.approx(logprob_slope, rel=1e-12, abs=1e-300)
        assert (parts.clipped_low[0, i].item(), parts.clipped_high[0, i].item()) == (low, high)


@settings(max_examples=60, deadline=None)
@given(CLIPPED, TOKENS)
def test_clipped_tokens_are_exactly_those_without_a_gradient(config, tokens):
    parts, gradient, _ = evaluate(config, tokens)
    matters = tensor([[advantage for *_, advantage in tokens]]) != 0
    clipped = parts.clipped_low | parts.clipped_high
    assert not (parts.clipped_low & parts.clipped_high).any()
    assert torch.equal(clipped[matters], gradient[matters] == 0)
    assert not clipped[~matters].any()


@settings(max_examples=40, deadline=None)
@given(CISPO | REINFORCE, TOKENS)
def test_every_token_keeps_its_gradient_where_the_ratio_is_only_a_weight(config, tokens):
    _, by_ratio, by_logprob = evaluate(config, tokens)
    advantages = tensor([[advantage for *_, advantage in tokens]])
    assert not by_ratio.any()
    if isinstance(config, ReinforceLoss) or config.clip_low < 1:
        assert torch.equal(by_logprob != 0, advantages != 0)
    # The gradient is -w A at each token whatever its log-prob, which is no part of the weight.
    elsewhere = evaluate(config, [(r, p / 2 - 1, a) for r, p, a in tokens])[2]
    assert torch.equal(elsewhere, by_logprob)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            # Log-ratios well inside every branch: the kinks are at log 0.8, log 1.28 and log 10.
            st.sampled_from([-3.0, -1.0, -0.3, -0.2, 0.0, 0.2, 0.3, 1.0, 2.2, 2.4, 4.0]),
            st.floats(-4, 0),
            st.sampled_from([-2.0, -0.5, 0.7, 1.5]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_autograd_agrees_with_finite_differences(tokens):
    log_ratio = tensor([[r for r, *_ in tokens]], grad=True)
    logprobs = tensor([[p for _, p, _ in tokens]], grad=True)
    advantages = tensor([[a for *_, a in tokens]])
    for loss in (ClippedPolicyLoss(), ClippedPolicyLoss(dual_clip=None)):
        by_ratio = lambda x, loss=loss: loss(x, logprobs.detach(), advantages).loss  # noqa: E731
        assert torch.autograd.gradcheck(by_ratio, (log_ratio,))
    for loss in (CispoLoss(), CispoLoss(clip_low=0.2, clip_high=0.28), ReinforceLoss()):
        by_logprob = lambda x, loss=loss: loss(log_ratio, x, advantages).loss  # noqa: E731
        assert torch.autograd.gradcheck(by_logprob, (logprobs,))


@settings(max_examples=40, deadline=None)
@given(CONFIGS, TOKENS)
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(config, tokens):
    if isinstance(config, ReinforceLoss) and (config.max_weight or 1) < 1:
        config = ReinforceLoss(1.0)
    parts, by_ratio, by_logprob = evaluate(config, [(0.0, p, a) for _, p, a in tokens])
    assert torch.equal(by_ratio + by_logprob, -tensor([[a for *_, a in tokens]]))
    assert not (parts.clipped_low | parts.clipped_high).any()


@settings(max_examples=40, deadline=None)
@given(TOKENS, st.floats(1.01, 20))
def test_dual_clip_bounds_the_loss_and_touches_only_negative_advantages(tokens, bound):
    dual, *_ = evaluate(ClippedPolicyLoss(dual_clip=bound), tokens)
    free, *_ = evaluate(ClippedPolicyLoss(dual_clip=None), tokens)
    advantages = tensor([[advantage for *_, advantage in tokens]])
    negative = advantages < 0
    assert torch.equal(dual.loss[~negative], free.loss[~negative])
    limit = -advantages[negative] * bound
    assert torch.equal(dual.loss[negative], torch.minimum(free.loss[negative], limit))
    assert (dual.loss[negative] <= limit).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), LOGPROBS, ADVANTAGES), min_size=1, max_size=8))
def test_bounds_that_are_wide_enough_clip_nothing(tokens):
    """Log-ratios of at most 3 lie between 1 - 0.999 and 1 + 1e6."""
    wide = ClippedPolicyLoss(clip_low=0.999, clip_high=1e6, dual_clip=None)
    parts, gradient, _ = evaluate(wide, tokens)
    expected = [-a * math.exp(r) for r, _, a in tokens]
    assert parts.loss[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert not (parts.clipped_low | parts.clipped_high).any()
    # CISPO without bounds and REINFORCE without a limit are one and the same.
    cispo, _, slope = evaluate(CispoLoss(clip_low=1.0, clip_high=1e6), tokens)
    plain, _, plain_slope = evaluate(ReinforceLoss(max_weight=None), tokens)
    assert torch.equal(cispo.loss, plain.loss)
    assert torch.equal(slope, plain_slope)
    assert slope[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_values_of_each_branch():
    ratios = [0.5, 0.9, 1.2, 2.0, 20.0]
    log_ratio = tensor([[math.log(r) for r in ratios]] * 2)
    logprobs, advantages = torch.full_like(log_ratio, -2.0), tensor([[1.0], [-1.0]])
    parts = ClippedPolicyLoss(0.2, 0.28, 10.0)(log_ratio, logprobs, advantages)
    expected = tensor([[-0.5, -0.9, -1.2, -1.28, -1.28], [0.8, 0.9, 1.2, 2.0, 10.0]])
    torch.testing.assert_close(parts.loss, expected)
    assert parts.clipped_low.tolist() == [[False] * 5, [True, *[False] * 4]]
    assert parts.clipped_high.tolist() == [[False] * 3 + [True] * 2, [*[False] * 4, True]]
    parts = CispoLoss(0.2, 0.28)(log_ratio, logprobs, advantages)
    weights = tensor([0.8, 0.9, 1.2, 1.28, 1.28])
    torch.testing.assert_close(parts.loss, torch.stack([2 * weights, -2 * weights]))
    assert parts.clipped_low.tolist() == [[True, *[False] * 4]] * 2
    assert parts.clipped_high.tolist() == [[False] * 3 + [True] * 2] * 2
    parts = ReinforceLoss(1.5)(log_ratio, logprobs, advantages)
    weights = tensor([0.5, 0.9, 1.2, 1.5, 1.5])
    torch.testing.assert_close(parts.loss, torch.stack([2 * weights, -2 * weights]))
    assert not parts.clipped_low.any()
    assert parts.clipped_high.tolist() == [[False] * 3 + [True] * 2] * 2


def test_the_defaults_are_those_of_the_papers():
    assert ClippedPolicyLoss() == ClippedPolicyLoss(0.2, 0.28, 10.0)
    ratios = tensor([[-20.0, 0.0, 20.0]])
    assert not CispoLoss()(ratios, ratios, ratios).clipped_low.any()  # no lower bound


@pytest.mark.parametrize(
    "config", [ClippedPolicyLoss(dual_clip=None), CispoLoss(), ReinforceLoss(None)]
)
@pytest.mark.parametrize("log_ratio", [20.0, -20.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_absurd_ratios_stay_finite_in_single_precision(config, log_ratio, advantage):
    log_ratio = torch.tensor([[log_ratio]], requires_grad=True)
    logprobs = torch.tensor([[-1e5]], requires_grad=True)
    parts = config(log_ratio, logprobs, torch.tensor([[advantage]]))
    parts.loss.sum().backward()
    assert parts.loss.dtype is torch.float32
    assert torch.isfinite(parts.loss).all()
    for gradient in (log_ratio.grad, logprobs.grad):
        assert gradient is None or torch.isfinite(gradient).all()


@EVERY
def test_only_the_loss_carries_a_gradient(config):
    log_ratio, logprobs = tensor([[0.1, -0.9]], grad=True), tensor([[-1.1, -1.9]], grad=True)
    parts = config(log_ratio, logprobs, tensor([[1.0]]))
    assert parts.loss.requires_grad
    assert not parts.clipped_low.requires_grad
    assert not parts.clipped_high.requires_grad
    assert parts.clipped_low.dtype is parts.clipped_high.dtype is torch.bool


@EVERY
def test_one_advantage_per_row_is_the_same_as_one_per_token(config):
    log_ratio, logprobs = tensor([[1.0, -2.0], [-0.1, 3.0]]), tensor([[-1.5, -0.2], [-4.0, -2.9]])
    advantages = tensor([[0.5], [-0.7]])
    rows = config(log_ratio, logprobs, advantages)
    tokens = config(log_ratio, logprobs, advantages.expand(2, 2))
    assert all(torch.equal(a, b) for a, b in zip(rows, tokens, strict=True))
    assert all(part.shape == (2, 2) for part in rows)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [
        (ClippedPolicyLoss, "clip_low", 0.0),
        (ClippedPolicyLoss, "clip_low", 1.0),
        (ClippedPolicyLoss, "clip_low", math.nan),
        (ClippedPolicyLoss, "clip_high", 0.0),
        (ClippedPolicyLoss, "clip_high", -0.2),
        (ClippedPolicyLoss, "clip_high", math.nan),
        (ClippedPolicyLoss, "dual_clip", 1.0),
        (ClippedPolicyLoss, "dual_clip", 0.0),
        (ClippedPolicyLoss, "dual_clip", math.nan),
        (CispoLoss, "clip_low", 0.0),
        (CispoLoss, "clip_low", 1.1),
        (CispoLoss, "clip_high", 0.0),
        (CispoLoss, "clip_high", math.nan),
        (ReinforceLoss, "max_weight", 0.0),
        (ReinforceLoss, "max_weight", -1.0),
        (ReinforceLoss, "max_weight", math.nan),
    ],
)
def test_a_bound_out_of_range_is_refused_by_name(loss, name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name}={value}"):
        loss(**{name: value})


def test_cispo_takes_the_lower_bound_that_sets_none():
    assert CispoLoss(clip_low=1.0).clip_low == 1.0
