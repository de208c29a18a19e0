"""What padding costs when the trainer scores responses of different lengths.

Scores the same rows in as few passes as hold them, padded to the longest, and in passes cut by
length, by turns in one process, and prints both side by side:

    python benchmarks/scoring.py

The model is made from a config and untrained: what a pass costs does not depend on its weights.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.partition import cut_by_length
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.policy.policy import Policy

VOCAB = 16_384
PROMPT = 16
"""Tokens of a prompt."""
FEWEST_PASSES = 10**9
"""What a pass has to cost, in tokens, for any padding to be better than another pass."""


def make_policy(hidden_size: int, layers: int) -> Policy:
    """An untrained model: 98 million parameters for 768 and 12."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        head_dim=64,
        tie_word_embeddings=True,
    )
    return Policy(Qwen3ForCausalLM(config).eval(), chunk_tokens=1024)


def make_rows(lengths: Sequence[int], seed: int) -> list[Trajectory]:
    """One trajectory per length, prompt and response together."""
    rng = random.Random(seed)
    rows = []
    for sample, length in enumerate(lengths):
        tokens = [rng.randrange(VOCAB) for _ in range(length)]
        rows.append(Trajectory(0, sample, "p", tuple(tokens[:PROMPT]), length))
        rows[-1].append(tokens[PROMPT:], None, 0)
    return rows


@torch.no_grad()
def seconds(policy: Policy, passes: Sequence[MicroBatch]) -> float:
    """How long scoring takes."""
    started = time.perf_counter()
    for batch in passes:
        policy(batch)
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=45)
    parser.add_argument("--longest", type=int, default=141)
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    rng = random.Random(options.seed)
    lengths = [rng.randint(options.shortest, options.longest) for _ in range(options.rows)]
    rows = make_rows(lengths, options.seed)
    policy = make_policy(options.hidden_size, options.layers)
    cuts = {
        "fewest passes": cut_by_length(lengths, options.max_tokens, FEWEST_PASSES),
        "cut by length": cut_by_length(lengths, options.max_tokens),
    }
    passes = {
        name: [collate([rows[i] for i in part], source=None) for part in parts]
        for name, parts in cuts.items()
    }
    times: dict[str, list[float]] = {name: [] for name in cuts}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, batches in passes.items():
            took = seconds(policy, batches)
            if turn:
                times[name].append(took)

    parameters = sum(p.numel() for p in policy.parameters())
    print(
        f"{options.rows} rows of {min(lengths)} to {max(lengths)} tokens, {parameters / 1e6:.0f} M "
        f"parameters, {torch.get_num_threads()} threads, median of {options.rounds} by turns"
    )
    for name, batches in passes.items():
        padded = sum(batch.input_ids.numel() for batch in batches)
        print(
            f"{name}: {len(batches)} passes, padded / real tokens {padded / sum(lengths):.2f}, "
            f"{statistics.median(times[name]):.2f} s ({min(times[name]):.2f} to "
            f"{max(times[name]):.2f})"
        )


if __name__ == "__main__":
    main()
