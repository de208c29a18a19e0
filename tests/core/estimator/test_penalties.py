"""The KL estimators: their values, and by exact enumeration what they are estimates of."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.estimator.penalties import KLPenalty, k1, k2, k3
from copris_lightning.errors import ConfigurationError

FLOAT = torch.float64
NEAR = st.floats(-8, 0)
LOGPROBS = NEAR | st.floats(-1e4, 0) | st.sampled_from([0.0, -1e4])


def tensor(values):
    return torch.tensor(values, dtype=FLOAT)


def exact_k3(x):
    """To sixty digits, so that the difference of near equals is exact."""
    x = max(-20.0, min(20.0, x))
    if abs(x) < 1e-15:
        return x * x / 2
    with localcontext() as context:
        context.prec = 60
        return float(Decimal(x).exp() - 1 - Decimal(x))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(LOGPROBS, LOGPROBS), min_size=1, max_size=8))
def test_the_estimators_follow_their_formulas(tokens):
    logprobs, other = (tensor(column) for column in zip(*tokens, strict=True))
    first, second, third = k1(logprobs, other), k2(logprobs, other), k3(logprobs, other)
    for i, (p, q) in enumerate(tokens):
        x = q - p
        assert first[i].item() == -x
        assert second[i].item() == pytest.approx(0.5 * x * x, rel=1e-14)
        assert third[i].item() == pytest.approx(exact_k3(x), rel=1e-12, abs=4e-16 * abs(x))
        assert third[i].item() >= 0
    assert torch.isfinite(third).all()


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT])
@pytest.mark.parametrize(
    ("logprob", "other"), [(-math.inf, -1.0), (-1.0, -math.inf), (-1e30, 0.0), (0.0, -1e30)]
)
def test_k3_stays_finite_and_lets_go_of_a_token_past_its_clamp(logprob, other, dtype):
    logprobs = torch.tensor([logprob], dtype=dtype, requires_grad=True)
    value = k3(logprobs, torch.tensor([other], dtype=dtype))
    value.backward()
    assert value.item() == pytest.approx(math.exp(20) - 21 if other > logprob else 19, rel=1e-6)
    assert logprobs.grad.item() == 0


def test_equal_policies_diverge_by_nothing_and_pull_nowhere():
    for estimator in (k2, k3):
        logprobs = tensor([-1.0, -50.0]).requires_grad_()
        value = estimator(logprobs, logprobs.detach())
        value.sum().backward()
        assert value.tolist() == [0.0, 0.0]
        assert logprobs.grad.tolist() == [0.0, 0.0]


LOGITS = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=2, max_size=6)


def policies(logits):
    own, other = (tensor(column) for column in zip(*logits, strict=True))
    own.requires_grad_()
    return own, torch.log_softmax(own, 0), torch.log_softmax(other, 0)


def divergence(p, q):
    """KL(p || q) by the definition, in plain floats."""
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_k1_and_k3_have_the_divergence_as_their_expectation(logits):
    _, logprobs, other = policies(logits)
    probabilities, expected = logprobs.detach().exp(), divergence(logprobs, other)
    for estimator in (k1, k3):
        mean = (probabilities * estimator(logprobs, other)).sum().item()
        assert mean == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # k2 is only close to it: within the cube of the log-ratio.
    x = (other - logprobs).abs()
    error = (probabilities * k2(logprobs, other)).sum().item() - expected
    assert abs(error) <= (probabilities * x**3 * x.exp()).sum().item() + 1e-12


@settings(max_examples=60, deadline=None)
@given(LOGITS)
def test_the_expected_gradients_are_what_the_docs_say(logits):
    """On-policy: k1's is zero, k2's that of KL(pi || other), k3's that of KL(other || pi)."""
    own, logprobs, other = policies(logits)
    forward = (logprobs.exp() * (logprobs - other)).sum()
    backward = (other.exp() * (other - logprobs)).sum()
    wanted = {k1: torch.zeros_like(own)}
    (wanted[k2],) = torch.autograd.grad(forward, own, retain_graph=True)
    (wanted[k3],) = torch.autograd.grad(backward, own, retain_graph=True)
    for estimator, gradient in wanted.items():
        mean = (logprobs.detach().exp() * estimator(logprobs, other)).sum()
        (actual,) = torch.autograd.grad(mean, own, retain_graph=True)
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_autograd_agrees_with_finite_differences(estimator):
    logprobs = tensor([[-1.0, -0.2, -3.0], [-7.0, -2.0, -0.1]]).requires_grad_()
    other = tensor([[-1.5, -0.1, -3.0], [-0.5, -2.5, -4.0]])
    assert torch.autograd.gradcheck(lambda x: estimator(x, other), (logprobs,))


@pytest.mark.parametrize(("name", "estimator"), [("k1", k1), ("k2", k2), ("k3", k3)])
def test_a_penalty_uses_the_estimator_of_its_name_and_leaves_out_the_coefficient(name, estimator):
    logprobs, reference = tensor([[-1.0, -4.0]]), tensor([[-1.5, -2.0]])
    penalty = KLPenalty(coefficient=0.3, estimator=name)
    assert torch.equal(penalty(logprobs, reference), estimator(logprobs, reference))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "k4"}, "estimator='k4' must be k1, k2 or k3"),
        ({"coefficient": 0.0}, "coefficient=0.0 must be a number above 0"),
        ({"coefficient": -1.0}, "coefficient=-1.0 must be a number above 0"),
        ({"coefficient": math.nan}, "coefficient=nan"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        KLPenalty(**arguments)


def test_by_default_the_penalty_is_grpos():
    assert KLPenalty().estimator == "k3"
    assert KLPenalty().reference is None
