"""A weight that did not arrive is found, whatever kernel holds it and however small the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from copris_lightning.weights.adapter import adapter_report
from copris_lightning.weights.arrival import Arrival, fault
from copris_lightning.weights.copies import checksum

Sent = dict[str, Tensor]


class UnquantizedLinearMethod:
    """Packs a copy of the weight and lets go of the weight, as vLLM's CPU kernels do."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.detach().t().clone()
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ layer.packed


class UnquantizedEmbeddingMethod(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.packed = layer.weight.detach().t().clone()


class Layer(nn.Module):
    def __init__(self, method: object, *shape: int) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)


class ParallelLMHead(Layer):
    pass


class Model(nn.Module):
    """Loads as vLLM does: parts are stacked, the embedding is padded, the head is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Layer(UnquantizedEmbeddingMethod(), 8, 4)
        self.qkv = Layer(UnquantizedLinearMethod(), 6, 4)
        self.norm = nn.LayerNorm(4, bias=False)
        self.norm.requires_grad_(False)
        self.head = ParallelLMHead(UnquantizedEmbeddingMethod(), 8, 4)
        self.head.weight = self.embed.weight
        self.skipped: set[str] = set()
        self.packs_head = True
        self.adds_one = False

    def load(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self.qkv.weight = nn.Parameter(torch.full((6, 4), 7.0), requires_grad=False)
        for name, tensor in tensors:
            if name in self.skipped:
                continue
            if name == "embed":
                self.embed.weight[:7].data.copy_(tensor)
                self.embed.weight[7:].data.fill_(0)
            elif name == "norm":
                self.norm.weight.data.copy_(tensor)
                if self.adds_one:
                    self.norm.weight.data.add_(1)
            elif name in "qkv":
                part = self.qkv.weight.data.narrow(0, 2 * "qkv".index(name), 2)
                part.copy_(tensor.t())  # stored the other way around
        self.qkv.quant_method.process_weights_after_loading(self.qkv)
        if self.packs_head:
            self.head.quant_method.process_weights_after_loading(self.head)


def weights(seed: int = 0) -> Sent:
    torch.manual_seed(seed)
    shapes = {"embed": (7, 4), "q": (4, 2), "k": (4, 2), "v": (4, 2), "norm": (4,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def load(arrival: Arrival, model: Model, sent: Sent) -> dict[str, Any]:
    """All in one part."""
    arrival.begin()
    with arrival.watching() as watched:
        model.load(watched(iter(sent.items())))
    return arrival.end()


@pytest.fixture
def running() -> tuple[Arrival, Model, Sent]:
    """Has loaded the weights once."""
    model, sent = Model(), weights()
    arrival = Arrival(model, torch.float32)
    report = load(arrival, model, sent)
    assert fault([report]) is None
    assert (report["tensors"], report["not_compared"]) == (5, [])
    return arrival, model, sent


def step(sent: Sent, name: str) -> Sent:
    """The smallest step that there is, in one element of one weight."""
    changed = {n: t.clone() for n, t in sent.items()}
    flat = changed[name].view(-1)
    flat[1] = torch.nextafter(flat[1], torch.tensor(torch.inf))
    return changed


def test_loads_that_change_little_or_nothing_are_no_error(
    running: tuple[Arrival, Model, Sent],
) -> None:
    arrival, model, sent = running
    for changed in (sent, sent, step(sent, "embed"), step(sent, "v"), weights(1)):
        assert fault([load(arrival, model, changed)]) is None
    assert "has what was sent, 5 tensors" in arrival.explain(iter(changed.items()))


def test_what_a_loader_makes_of_a_weight_is_not_held_against_it(
    running: tuple[Arrival, Model, Sent],
) -> None:
    arrival, model, sent = running
    model.adds_one = True
    for changed in (sent, step(sent, "norm")):
        assert fault([load(arrival, model, changed)]) is None


def stale_head(model: Model) -> None:
    model.packs_head = False


@pytest.mark.parametrize(
    ("changed", "spoil", "found"),
    [
        ("embed", stale_head, "does not compute with what was sent for head.weight"),
        ("k", lambda model: model.skipped.add("k"), "what was sent for qkv.weight"),
        ("norm", lambda model: model.skipped.add("norm"), "nothing was sent for its norm.weight"),
        ("embed", lambda model: model.skipped.add("embed"), "nothing was sent for its embed.wei"),
    ],
)
def test_a_weight_that_stayed_as_it_was_is_named(
    running: tuple[Arrival, Model, Sent],
    changed: str,
    spoil: Callable[[Model], None],
    found: str,
) -> None:
    arrival, model, sent = running
    spoil(model)
    message = fault([load(arrival, model, step(sent, changed))])
    assert message is not None
    assert found in message


def test_a_packed_copy_that_was_not_renewed_is_found(
    running: tuple[Arrival, Model, Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrival, model, sent = running
    before = model.qkv.packed
    process = UnquantizedLinearMethod.process_weights_after_loading

    def keep(self: Any, layer: Any) -> None:
        process(self, layer)
        if layer is model.qkv:
            layer.packed = before

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", keep)
    assert fault([load(arrival, model, sent)]) is None
    message = fault([load(arrival, model, step(sent, "q"))])
    assert message == "it does not compute with what was sent for qkv.weight"


def test_weights_that_change_after_a_load_are_found_when_asked(
    running: tuple[Arrival, Model, Sent],
) -> None:
    arrival, model, sent = running
    model.norm.weight.data[0] += 1
    assert "compute with what was sent for norm.weight" in arrival.explain(iter(sent.items()))
    model.norm.weight.data.copy_(sent["norm"])
    assert "no longer what was sent: q" in arrival.explain(iter(step(sent, "q").items()))


def test_a_name_that_has_no_place_in_the_engine_is_an_error_once_it_is_trained(
    running: tuple[Arrival, Model, Sent],
) -> None:
    arrival, model, sent = running
    more = {**sent, "other": torch.ones(3)}
    assert fault([load(arrival, model, more)]) is None
    assert arrival.explain(iter(more.items())) == "the engine has no place for other"
    report = load(arrival, model, step(more, "other"))
    assert fault([report]) == "it has no place for the trainer's other"
    assert fault([report, {**report, "unused": []}]) is None  # another worker has it


def test_checksums_know_elements_and_not_their_order() -> None:
    tensor = torch.randn(5, 3)
    padded = torch.zeros(7, 4)
    padded[:5, :3] = tensor
    assert checksum(tensor) == checksum(tensor.t()) == checksum(padded)
    assert checksum(tensor) == (checksum(tensor[:2]) + checksum(tensor[2:])) % 2**64
    other = tensor.clone()
    other[2, 1] = torch.nextafter(other[2, 1], torch.tensor(torch.inf))
    assert checksum(other) != checksum(tensor)
    assert checksum(tensor.bfloat16()) != checksum(tensor)


def test_adapters_are_compared_with_the_slots_that_hold_them() -> None:
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    sent = {"qkv.lora_A": a, "qkv.lora_B": b, "o.lora_A": a + 1, "o.lora_B": torch.zeros(4, 2)}

    def slot(tensor: Tensor) -> Tensor:
        padded = torch.zeros(1, 8, 8)
        padded[0, : tensor.shape[0], : tensor.shape[1]] = tensor
        return padded

    # One layer of the trainer's is three of the engine's, which share its A.
    held = [
        [slot(a)] * 3,
        [slot(part) for part in b.split(2)],
        [slot(a + 1)],
        [slot(torch.zeros(4, 2))],
    ]
    assert fault([adapter_report(iter(sent.items()), held)]) is None
    held[1][2] = slot(b[:2])
    report = adapter_report(iter(sent.items()), held)
    assert fault([report]) == "it does not compute with what was sent for qkv.lora_B"
