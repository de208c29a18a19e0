"""What the policy is set to besides its estimator: small objects, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass

from copris_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Precision:
    """What the policy is held and computed in. (What of it is rounded in between is the trainer's
    ``precision``.)

    Attributes:
        dtype: of the parameters: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: as for ``from_pretrained``.
        liger: with Liger's kernels for norms, rotary positions and MLPs (GPUs, ``liger-kernel``).
    """

    dtype: str = "float32"
    attn_implementation: str = "sdpa"
    liger: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigurationError(f"dtype={self.dtype!r} must be float32, bfloat16 or float16")


@dataclass(frozen=True)
class Memory:
    """What a step keeps, and what it computes again instead.

    Attributes:
        packing: compute on sequences one after the other, without padding, where the model gives
            the same log-probs by it (a run begins by looking); else on padded ones.
        gradient_checkpointing: recompute activations in the backward pass.
        logprob_chunk_tokens: tokens whose logits are held at a time.
    """

    packing: bool = True
    gradient_checkpointing: bool = False
    logprob_chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.logprob_chunk_tokens < 1:
            raise ConfigurationError(
                f"logprob_chunk_tokens={self.logprob_chunk_tokens} must be at least 1"
            )
