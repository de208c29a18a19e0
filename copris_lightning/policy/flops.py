"""What a model's passes cost in floating-point operations, and what a device could do at best."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from copris_lightning.policy.pretrained import empty_model

_TERA = 1e12

_PEAKS = {
    "A10": 125,
    "A30": 165,
    "A40": 149.7,
    "A100": 312,
    "A100 PCIE": 312,
    "B200": 2250,
    "GH200": 989,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIE": 756,
    "H200": 989,
    "H200 NVL": 835,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "MI300X": 1307.4,
    "RTX A6000": 154.8,
    "RTX 3090": 71,
    "RTX 4090": 165.2,
    "RTX 6000 ADA": 364,
}
"""Dense bf16 matrix products, TFLOP/s, from the vendors' data sheets and white papers. Where these
give the rate with structured sparsity (since Ampere, often the only one), half of it."""

_NOISE = re.compile(r"NVIDIA|AMD|INSTINCT|TESLA|GEFORCE|GENERATION|HBM\w*|SXM\d?|\d+GB")


def peak_flops(name: str) -> float | None:
    """A device's dense bf16 peak in FLOP/s; ``None`` where it is not known.

    Args:
        name: as :func:`torch.cuda.get_device_name` gives it. A part of a device (MIG) is not known,
            nor is a kind that is not in the table.
    """
    words = re.split(r"[\s-]+", name.upper())
    known = _PEAKS.get(" ".join(word for word in words if not _NOISE.fullmatch(word)))
    return None if known is None else known * _TERA


def device_peak(device: torch.device) -> float | None:
    """As :func:`peak_flops`, of a device of this process; ``None`` for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass
class Work:
    """Sequences that a model passed over.

    Attributes:
        tokens: of the sequences, prompts included.
        responses: of these, response tokens; the output head sees those only.
        squares: sum of the sequences' squared lengths.
    """

    tokens: int = 0
    responses: int = 0
    squares: int = 0

    def add(self, tokens: int, responses: int) -> None:
        """Another sequence."""
        self.tokens += tokens
        self.responses += responses
        self.squares += tokens * tokens


@dataclass(frozen=True)
class ModelCost:
    """A dense transformer's cost, by the formula of PaLM (arXiv 2204.02311, appendix B).

    A forward pass takes 2 N FLOPs per token and a backward pass twice that: 2 N for the gradients
    of the inputs, 2 N for those of the weights, so 6 N in training. Attention adds 4 L H Q per
    token and token attended to, and twice that backwards: with the half that a causal mask leaves
    (as in arXiv 2307.08691, section 4.1), 2 L H Q s^2 for a forward pass over s tokens. N are the
    weights that a token is multiplied with: not the input embedding, and the head's only where a
    response token is predicted. Padding, recomputed activations, a reference policy and the
    optimizer are not counted. A sliding window is not known of, and counts as full attention.

    Attributes:
        body: weights of all layers.
        head: weights of the output head.
        attention: L H Q: layers x heads x size of a head.
        trained_body: of ``body``, those with a gradient (fewer with adapters).
        trained_head: of ``head``, likewise.
    """

    body: int
    head: int
    attention: int
    trained_body: int
    trained_head: int

    @classmethod
    def of(cls, module: Any) -> ModelCost | None:
        """A :class:`~copris_lightning.policy.module.CoprisModule`'s; ``None`` where not every token
        is multiplied with every weight (experts), or a layer is more than matrices."""
        model: Any = empty_model(module.model, trust_remote_code=module.trust_remote_code)
        if module.lora is not None:
            module.lora.insert(model)
        config = model.config.get_text_config()
        is_dense = getattr(config, "num_experts_per_tok", None) is None
        parameters = list(model.parameters())
        if not is_dense or any(p.ndim > 2 for p in parameters):
            return None
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        head = model.get_output_embeddings().weight
        outside = {id(head), id(model.get_input_embeddings().weight)}
        body = [p for p in parameters if id(p) not in outside]
        return cls(
            body=sum(p.numel() for p in body),
            head=head.numel(),
            attention=config.num_hidden_layers * heads * size,
            trained_body=sum(p.numel() for p in body if p.requires_grad),
            trained_head=head.numel() if head.requires_grad else 0,
        )

    def forward(self, work: Work) -> int:
        """FLOPs of scoring."""
        weights = self.body * work.tokens + self.head * work.responses
        return 2 * weights + 2 * self.attention * work.squares

    def training(self, work: Work) -> int:
        """FLOPs of a forward and a backward pass."""
        gradients = self.trained_body * work.tokens + self.trained_head * work.responses
        weights = self.body * work.tokens + self.head * work.responses
        return 4 * weights + 2 * gradients + 6 * self.attention * work.squares
