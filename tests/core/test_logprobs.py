"""Chunked log-probs equal the dense ones, and no tensor is ever as big as the dense logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from copris_lightning.core.logprobs import token_logprobs

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
