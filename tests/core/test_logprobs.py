"""Chunked log-probs and entropies equal the dense ones, and no tensor is as big as dense logits."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from copris_lightning.core.logprobs import token_logprobs, token_logprobs_and_entropy

N, D, V = 11, 5, 23


def problem(n=N, vocab=V, width=D):
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    targets = torch.randint(vocab, (n,), generator=generator)
    return hidden, weight, targets


def dense(hidden, weight, targets, temperature):
    logits = hidden.double() @ weight.double().T / temperature
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]


def gradients(values, *inputs):
    """By a weighted sum, so that tokens cannot be swapped without notice."""
    weights = torch.arange(1.0, len(values) + 1, dtype=values.dtype)
    return torch.autograd.grad((values * weights).sum(), inputs)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("chunk", [1, 2, 4, N - 1, N, N + 1, 1000])
def test_chunked_values_and_gradients_equal_dense_ones(chunk, temperature):
    hidden, weight, targets = problem()
    values = token_logprobs(
        hidden, targets, lambda h: h @ weight.T, temperature=temperature, chunk_tokens=chunk
    )
    expected = dense(hidden, weight, targets, temperature)
    assert (values.shape, values.dtype) == ((N,), torch.float32)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    actual = gradients(values, hidden, weight)
    for ours, theirs in zip(actual, gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_values_without_gradient_are_the_same(chunk):
    hidden, weight, targets = problem()
    with torch.no_grad():
        values = token_logprobs(hidden, targets, lambda h: h @ weight.T, chunk_tokens=chunk)
    assert not values.requires_grad
    torch.testing.assert_close(
        values.double(), dense(hidden, weight, targets, 1.0), rtol=1e-5, atol=1e-5
    )


def test_no_tokens_have_no_logprobs_and_still_a_gradient_of_zero():
    hidden, weight, targets = problem(n=0)
    values = token_logprobs(hidden, targets, lambda h: h @ weight.T)
    assert (values.shape, values.dtype) == ((0,), torch.float32)
    values.sum().backward()
    assert hidden.grad.shape == (0, D)
    assert weight.grad is None or not weight.grad.any()


def test_probabilities_over_the_vocabulary_add_up_to_one_at_any_temperature():
    hidden, weight, _ = problem(n=1)
    for temperature in (0.3, 1.0, 2.5):
        values = token_logprobs(
            hidden.expand(V, D),
            torch.arange(V),
            lambda h: h @ weight.T,
            temperature=temperature,
            chunk_tokens=7,
        )
        assert values.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_logits_of_low_precision_are_normalised_in_fp32():
    hidden, weight, targets = problem()
    low, head = hidden.detach().bfloat16(), weight.detach().bfloat16()
    values = token_logprobs(low, targets, lambda h: h @ head.T, chunk_tokens=4)
    assert values.dtype is torch.float32
    logits = (low @ head.T).double()
    expected = torch.log_softmax(logits, dim=-1)[torch.arange(N), targets]
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


def test_huge_logits_do_not_overflow():
    hidden = torch.tensor([[1e30], [-1e30]])
    values = token_logprobs(hidden, torch.tensor([0, 0]), lambda h: torch.cat([h, -h], dim=-1))
    assert values.tolist() == [0.0, pytest.approx(-2e30)]


def test_unequal_numbers_of_chunks_are_refused():
    hidden, weight, targets = problem()
    with pytest.raises(ValueError, match="zip"):
        token_logprobs(hidden, targets[:4], lambda h: h @ weight.T, chunk_tokens=4)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_no_tensor_of_all_logits_is_made_forward_or_backward():
    n, vocab, width, chunk = 256, 512, 4, 16
    hidden, weight, targets = problem(n, vocab, width)
    sizes = []

    def head(h):
        logits = h @ weight.T
        sizes.append(tuple(logits.shape))
        return logits

    with LargestTensor() as largest:
        values = token_logprobs(hidden, targets, head, chunk_tokens=chunk)
        forward_calls = len(sizes)
        values.sum().backward()
    assert largest.numel == chunk * vocab
    assert set(sizes) == {(chunk, vocab)}
    assert forward_calls == n // chunk
    assert weight.grad.abs().sum() > 0


def test_logits_are_made_again_in_the_backward_pass_rather_than_kept():
    hidden, weight, targets = problem()
    kept, calls = [], []

    def head(h):
        calls.append(len(h))
        return h @ weight.T

    def pack(value):
        kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        values = token_logprobs(hidden, targets, head, chunk_tokens=4)
    assert not any(V in shape for shape in kept)
    assert calls == [4, 4, 3]
    values.sum().backward()
    assert sorted(calls) == sorted([4, 4, 3] * 2)


# ---------------------------------------------------------------- entropy


def dense_entropy(hidden, weight, temperature):
    """The definition in double: minus the sum of p log p, where p is not zero."""
    values = []
    for row in (hidden.double() @ weight.double().T / temperature).unbind():
        p = (row - row.max().detach()).exp()
        p = p / p.sum()
        values.append(-(p[p > 0] * p[p > 0].log()).sum())
    return torch.stack(values)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("chunk", [1, 4, N, 1000])
def test_entropies_and_their_gradients_equal_the_definition(chunk, temperature):
    hidden, weight, targets = problem()
    logprobs, entropy = token_logprobs_and_entropy(
        hidden, targets, lambda h: h @ weight.T, temperature=temperature, chunk_tokens=chunk
    )
    assert (entropy.shape, entropy.dtype) == (logprobs.shape, logprobs.dtype)
    assert (entropy.shape, entropy.dtype) == ((N,), torch.float32)
    expected = dense_entropy(hidden, weight, temperature)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    same = token_logprobs(hidden, targets, lambda h: h @ weight.T, temperature=temperature)
    torch.testing.assert_close(logprobs, same)
    # Both at once, so that neither takes the other's gradient.
    both = dense(hidden, weight, targets, temperature) + 0.7 * expected
    actual = gradients(logprobs + 0.7 * entropy, hidden, weight)
    for ours, theirs in zip(actual, gradients(both, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_the_gradient_of_an_entropy_agrees_with_finite_differences():
    """Steps of 0.01: logits are of single precision."""
    hidden, weight, targets = problem(n=3, vocab=5, width=2)
    inputs = hidden.detach().double().requires_grad_()
    for pick in (0, 1):
        assert torch.autograd.gradcheck(
            lambda h, pick=pick: token_logprobs_and_entropy(
                h, targets, lambda x: x @ weight.detach().double().T, chunk_tokens=2
            )[pick].double(),
            (inputs,),
            eps=1e-2,
            atol=2e-3,
            rtol=1e-3,
        )


def test_entropies_of_known_distributions():
    hidden = torch.tensor([[0.0], [100.0], [-100.0]])
    _, entropy = token_logprobs_and_entropy(
        hidden, torch.zeros(3, dtype=torch.long), lambda h: h * torch.tensor([0.0, 1.0, 1.0, 1.0])
    )
    assert entropy.tolist() == pytest.approx([math.log(4), math.log(3), 0.0], abs=1e-5)


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize("allowed", [1, 2, V - 1])
def test_tokens_that_cannot_occur_make_no_nan_forward_or_backward(allowed, differentiable):
    hidden, weight, targets = problem()
    targets = targets % allowed
    banned = torch.zeros(V).index_fill(0, torch.arange(allowed, V), -math.inf)
    logprobs, entropy = token_logprobs_and_entropy(
        hidden,
        targets,
        lambda h: h @ weight.T + banned,
        chunk_tokens=4,
        differentiable=differentiable,
    )
    few = weight[:allowed]
    expected = dense_entropy(hidden, few, 1.0)
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    # A bonus is much smaller than one: scaled as losses are, by a share of the batch.
    total = dense(hidden, few, targets, 1.0)
    total = total + 0.01 * expected if differentiable else total
    actual = gradients(logprobs + 0.01 * entropy, hidden, weight)
    for ours, theirs in zip(actual, gradients(total, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_an_entropy_that_only_is_measured_has_no_gradient_and_leaves_the_logprobs_theirs():
    hidden, weight, targets = problem()
    head = lambda h: h @ weight.T  # noqa: E731
    logprobs, entropy = token_logprobs_and_entropy(
        hidden, targets, head, chunk_tokens=4, differentiable=False
    )
    wanted, differentiable = token_logprobs_and_entropy(hidden, targets, head, chunk_tokens=4)
    assert torch.equal(entropy, differentiable)
    # Through both, as the loss does: what comes from the entropy is nothing.
    actual = gradients(logprobs + 100.0 * entropy, hidden, weight)
    expected = gradients(wanted, hidden, weight)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_entropies_without_gradient_are_the_same():
    hidden, weight, targets = problem()
    with torch.no_grad():
        logprobs, entropy = token_logprobs_and_entropy(
            hidden, targets, lambda h: h @ weight.T, chunk_tokens=4
        )
    assert not logprobs.requires_grad
    assert not entropy.requires_grad
    expected = dense_entropy(hidden, weight, 1.0)
    torch.testing.assert_close(entropy.double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_no_tokens_have_no_entropies():
    hidden, weight, targets = problem(n=0)
    logprobs, entropy = token_logprobs_and_entropy(hidden, targets, lambda h: h @ weight.T)
    for values in (logprobs, entropy):
        assert (values.shape, values.dtype) == ((0,), torch.float32)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, D)


def test_entropies_of_low_precision_are_taken_in_fp32():
    hidden, weight, targets = problem()
    low, head = hidden.detach().bfloat16(), weight.detach().bfloat16()
    _, entropy = token_logprobs_and_entropy(low, targets, lambda h: h @ head.T, chunk_tokens=4)
    assert entropy.dtype is torch.float32
    expected = torch.distributions.Categorical(logits=(low @ head.T).double()).entropy()
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("differentiable", [True, False])
def test_entropies_make_no_tensor_of_all_logits_either(differentiable):
    n, vocab, width, chunk = 256, 512, 4, 16
    hidden, weight, targets = problem(n, vocab, width)
    calls = []

    def head(h):
        calls.append(len(h))
        return h @ weight.T

    with LargestTensor() as largest:
        logprobs, entropy = token_logprobs_and_entropy(
            hidden, targets, head, chunk_tokens=chunk, differentiable=differentiable
        )
        forward_calls = len(calls)
        (logprobs + 0.1 * entropy).sum().backward()
    assert largest.numel == chunk * vocab
    assert calls == [chunk] * (2 * n // chunk)
    assert forward_calls == n // chunk
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("differentiable", [True, False])
def test_entropies_keep_no_logits_for_the_backward_pass(differentiable):
    hidden, weight, targets = problem()
    kept = []

    def pack(value):
        kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        token_logprobs_and_entropy(
            hidden, targets, lambda h: h @ weight.T, chunk_tokens=4, differentiable=differentiable
        )
    assert not any(V in shape for shape in kept)
