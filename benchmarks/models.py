"""Untrained models for benchmarks: what an engine or a pass costs does not depend on the values."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar
from workload import PROMPT_TOKENS

from copris_lightning.core.trajectory import Trajectory
from copris_lightning.quickstart.warm_start import character_tokenizer


def quiet() -> None:
    """Nothing but warnings from the libraries, here and in the engine's processes."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    disable_progress_bar()


def qwen3(
    hidden_size: int, layers: int, *, vocab: int = 16_384, context: int = 2048, head_dim: int = 64
) -> Qwen3ForCausalLM:
    """A Qwen3 with tied embeddings: 98 M parameters for 768 and 12, 0.6 M for 128, 3, a vocabulary
    of 98 and heads of 32."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // head_dim,
        num_key_value_heads=max(1, hidden_size // head_dim // 2),
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def save(model: Qwen3ForCausalLM, folder: str | Path) -> str:
    """The checkpoint of a model, with a tokenizer of 98 characters. Returns the folder."""
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return str(folder)


def parameters(model: Qwen3ForCausalLM) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters())


def rows(lengths: Sequence[int], seed: int, vocab: int = 16_384) -> list[Trajectory]:
    """One trajectory of random tokens per length, prompt and response together."""
    rng = random.Random(seed)
    made = []
    for sample, length in enumerate(lengths):
        tokens = [rng.randrange(vocab) for _ in range(length)]
        made.append(Trajectory(0, sample, "p", tuple(tokens[:PROMPT_TOKENS]), length))
        made[-1].append(tokens[PROMPT_TOKENS:], None, 0)
    return made
