"""The clipped loss against a loop in plain floats, and identities that do not need one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.batching import collate
from copris_lightning.core.losses import MAX_LOG_RATIO, ClippedPolicyLoss, importance_ratio
from copris_lightning.core.trajectory import Segment, Trajectory


def tensor(values, *, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def oracle(logprob, behavior, advantage, config):
    """Loss, its derivative by the log-prob, and the ratio of one token, case by case."""
    log_ratio = logprob - behavior if config.importance_sampling else 0.0
    r = math.exp(max(-20.0, min(20.0, log_ratio)))
    free = abs(log_ratio) <= 20.0  # past this the ratio is held, and nothing flows
    if advantage >= 0:
        top = 1 + config.clip_high
        return -advantage * min(r, top), -advantage * r if r <= top and free else 0.0, r
    bottom = 1 - config.clip_low
    bound = math.inf if config.dual_clip is None else config.dual_clip
    moves = bottom <= r <= bound and free
    return -advantage * min(max(r, bottom), bound), -advantage * r if moves else 0.0, r


CONFIGS = st.builds(
    ClippedPolicyLoss,
    clip_low=st.floats(0.01, 0.99),
    clip_high=st.floats(0.01, 3.0),
    dual_clip=st.none() | st.floats(1.01, 20.0),
    importance_sampling=st.booleans(),
)
LOGPROBS = st.floats(-5, 0) | st.floats(-1e4, 0) | st.sampled_from([0.0, -1e30])
ADVANTAGES = st.floats(1e-3, 3) | st.floats(-3, -1e-3) | st.just(0.0)
TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, ADVANTAGES), min_size=1, max_size=8)
NEAR = st.floats(-4, 0)
NEAR_TOKENS = st.lists(st.tuples(NEAR, NEAR, ADVANTAGES), min_size=1, max_size=8)


def evaluate(config, tokens):
    """The loss's parts and the gradient by the current log-probs, ``[1, tokens]`` each."""
    now, behavior, advantages = (tensor([row]) for row in zip(*tokens, strict=True))
    now.requires_grad_()
    parts = config(now, behavior, advantages)
    (gradient,) = torch.autograd.grad(parts.loss.sum(), now)
    return parts, gradient


@settings(max_examples=300, deadline=None)
@given(CONFIGS, TOKENS | NEAR_TOKENS)
def test_loss_gradient_and_ratio_follow_the_formula(config, tokens):
    parts, gradient = evaluate(config, tokens)
    for i, token in enumerate(tokens):
        loss, slope, ratio = oracle(*token, config)
        assert parts.loss[0, i].item() == pytest.approx(loss, rel=1e-12, abs=1e-300)
        assert gradient[0, i].item() == pytest.approx(slope, rel=1e-12, abs=1e-300)
        assert parts.ratio[0, i].item() == pytest.approx(ratio, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(CONFIGS, NEAR_TOKENS)
def test_clipped_tokens_are_exactly_those_without_a_gradient(config, tokens):
    parts, gradient = evaluate(config, tokens)
    matters = tensor([[advantage for *_, advantage in tokens]]) != 0
    assert parts.clipped.dtype is torch.bool
    assert torch.equal(parts.clipped[matters], gradient[matters] == 0)
    assert not parts.clipped[~matters].any()


@pytest.mark.parametrize(("now", "behavior"), [(0.0, -1e30), (-1e30, 0.0), (-math.inf, -1.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_absurd_ratios_stay_finite_in_single_precision(now, behavior, advantage):
    logprobs = torch.tensor([[now]], requires_grad=True)
    parts = ClippedPolicyLoss(dual_clip=None)(
        logprobs, torch.tensor([[behavior]]), torch.tensor([[advantage]])
    )
    parts.loss.sum().backward()
    assert torch.isfinite(parts.loss).all()
    assert torch.isfinite(parts.ratio).all()
    assert logprobs.grad.item() == 0
    assert MAX_LOG_RATIO == 20


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            # Log-ratios well inside every branch: the kinks are at log 0.8, log 1.28 and log 10.
            st.sampled_from([-3.0, -1.0, -0.3, -0.2, 0.0, 0.2, 0.3, 1.0, 2.2, 2.4, 4.0]),
            NEAR,
            st.sampled_from([-2.0, -0.5, 0.7, 1.5]),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_autograd_agrees_with_finite_differences(tokens):
    behavior = tensor([[b for _, b, _ in tokens]])
    now = (behavior + tensor([[r for r, _, _ in tokens]])).requires_grad_()
    advantages = tensor([[a for *_, a in tokens]])
    loss = ClippedPolicyLoss()
    assert torch.autograd.gradcheck(lambda x: loss(x, behavior, advantages).loss, (now,))


@settings(max_examples=50, deadline=None)
@given(CONFIGS, NEAR_TOKENS)
def test_on_policy_the_gradient_is_the_plain_policy_gradient(config, tokens):
    parts, gradient = evaluate(config, [(now, now, advantage) for now, _, advantage in tokens])
    assert torch.equal(gradient, -tensor([[advantage for *_, advantage in tokens]]))
    assert (parts.ratio == 1).all()
    assert not parts.clipped.any()


@settings(max_examples=50, deadline=None)
@given(TOKENS)
def test_without_importance_sampling_the_behaviour_has_no_influence(tokens):
    config = ClippedPolicyLoss(importance_sampling=False)
    parts, gradient = evaluate(config, tokens)
    advantages = tensor([[advantage for *_, advantage in tokens]])
    assert (parts.ratio == 1).all()
    assert not parts.clipped.any()
    assert torch.equal(gradient, -advantages)
    assert torch.equal(parts.loss, -advantages)


@settings(max_examples=100, deadline=None)
@given(TOKENS, st.floats(1.01, 20))
def test_dual_clip_bounds_the_loss_and_touches_only_negative_advantages(tokens, bound):
    dual, _ = evaluate(ClippedPolicyLoss(dual_clip=bound), tokens)
    free, _ = evaluate(ClippedPolicyLoss(dual_clip=None), tokens)
    advantages = tensor([[advantage for *_, advantage in tokens]])
    negative = advantages < 0
    assert torch.equal(dual.loss[~negative], free.loss[~negative])
    limit = -advantages[negative] * bound
    assert torch.equal(dual.loss[negative], torch.minimum(free.loss[negative], limit))


def test_values_of_each_branch():
    ratios = [0.5, 0.9, 1.2, 2.0, 20.0]
    config = ClippedPolicyLoss(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    now = tensor([[math.log(r) for r in ratios]] * 2)
    parts = config(now, torch.zeros_like(now), tensor([[1.0], [-1.0]]))
    expected = tensor([[-0.5, -0.9, -1.2, -1.28, -1.28], [0.8, 0.9, 1.2, 2.0, 10.0]])
    torch.testing.assert_close(parts.loss, expected)
    assert parts.clipped.tolist() == [
        [False, False, False, True, True],
        [True, False, False, False, True],
    ]


def test_only_the_current_logprobs_get_a_gradient():
    now, behavior = tensor([[-1.0, -2.0]], grad=True), tensor([[-1.1, -1.9]], grad=True)
    parts = ClippedPolicyLoss()(now, behavior, tensor([[1.0]]))
    parts.loss.sum().backward()
    assert behavior.grad is None
    assert (now.grad != 0).all()
    assert not parts.ratio.requires_grad
    assert not parts.clipped.requires_grad


def test_one_advantage_per_row_is_the_same_as_one_per_token():
    now, behavior = tensor([[-1.0, -2.0], [-0.1, -3.0]]), tensor([[-1.5, -0.2], [-4.0, -2.9]])
    advantages = tensor([[0.5], [-0.7]])
    rows = ClippedPolicyLoss()(now, behavior, advantages)
    tokens = ClippedPolicyLoss()(now, behavior, advantages.expand(2, 2))
    assert all(torch.equal(a, b) for a, b in zip(rows, tokens, strict=True))
    assert rows.loss.shape == (2, 2)


def test_each_token_is_compared_with_the_policy_that_made_it():
    """Two versions wrote the response; under each the ratio is to that version's log-probs."""
    segments = [Segment(3, [5, 6], [-9.0] * 2, [-1.0, -2.0]), Segment(5, [7], [-9.0], [-0.5])]
    batch = collate([Trajectory(0, 0, "p", (1,), 8, segments)], source="trainer")
    assert batch.versions.tolist() == [[3, 3, 5]]
    now = torch.tensor([[-1.5, -2.0, -0.1]])
    ratio = ClippedPolicyLoss()(now, batch.behavior_logprobs, torch.ones(1, 1)).ratio
    torch.testing.assert_close(ratio, torch.tensor([[-0.5, 0.0, 0.4]]).exp())
    changed = ClippedPolicyLoss()(
        now + torch.tensor([[0.0, 0.3, 0.0]]), batch.behavior_logprobs, torch.ones(1, 1)
    ).ratio
    assert (changed == ratio).tolist() == [[True, False, True]]
    assert torch.equal(importance_ratio(now, batch.behavior_logprobs), ratio)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_low", 0.0),
        ("clip_low", 1.0),
        ("clip_high", 0.0),
        ("clip_high", -0.2),
        ("dual_clip", 1.0),
        ("dual_clip", 0.0),
    ],
)
def test_a_bound_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        ClippedPolicyLoss(**{name: value})
