"""What padding costs when the trainer looks at responses of different lengths, and packing saves.

Takes the same rows packed; padded and cut by length; padded in as few passes as hold them; and as
many real tokens in rows of one length, which need neither. By turns in one process; a pass's time
is compared with that of the equal rows in the same turn:

    python benchmarks/scoring.py                # the passes that recompute log-probs
    python benchmarks/scoring.py --train        # forward and backward, as a training step

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
from copris_lightning.core.packing import pack
from copris_lightning.core.partition import cut_by_length
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.policy.policy import Policy

VOCAB = 16_384
PROMPT = 16
"""Tokens of a prompt."""
FEWEST_PASSES = 10**9
"""What a pass has to cost, in tokens, for any padding to be better than another pass."""
EQUAL = "equal rows"
"""What the others are compared with."""


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
    policy = Policy(Qwen3ForCausalLM(config).eval(), chunk_tokens=1024)
    policy.pack(policy.ask)
    return policy


def make_rows(lengths: Sequence[int], seed: int) -> list[Trajectory]:
    """One trajectory per length, prompt and response together."""
    rng = random.Random(seed)
    rows = []
    for sample, length in enumerate(lengths):
        tokens = [rng.randrange(VOCAB) for _ in range(length)]
        rows.append(Trajectory(0, sample, "p", tuple(tokens[:PROMPT]), length))
        rows[-1].append(tokens[PROMPT:], None, 0)
    return rows


def equal_lengths(lengths: Sequence[int]) -> list[int]:
    """As many tokens in as many rows, of one length but for the remainder of a division."""
    tokens, count = sum(lengths), len(lengths)
    return [tokens // count + (i < tokens % count) for i in range(count)]


def cuts(lengths: Sequence[int], max_tokens: int) -> dict[str, tuple[bool, list[list[int]]]]:
    """Ways to take rows: by name, whether packed, and the rows of each pass."""
    return {
        "packed": (True, pack(lengths, max_tokens)),
        "cut by length": (False, cut_by_length(lengths, max_tokens)),
        "fewest passes": (False, cut_by_length(lengths, max_tokens, FEWEST_PASSES)),
    }


def seconds(policy: Policy, passes: Sequence[MicroBatch], *, packed: bool, train: bool) -> float:
    """How long it takes to score them, or to train on them."""
    policy.packs = packed
    started = time.perf_counter()
    with torch.set_grad_enabled(train):
        for batch in passes:
            logprobs, _ = policy(batch)
            if train:
                logprobs.sum().backward()
    took = time.perf_counter() - started
    policy.zero_grad()
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=45)
    parser.add_argument("--longest", type=int, default=450)
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", action="store_true", help="backward passes, too")
    options = parser.parse_args(arguments)

    rng = random.Random(options.seed)
    lengths = [rng.randint(options.shortest, options.longest) for _ in range(options.rows)]
    equal = equal_lengths(lengths)
    ways = {
        name: (packed, [collate([rows[i] for i in part], source=None) for part in parts])
        for rows in [make_rows(lengths, options.seed)]
        for name, (packed, parts) in cuts(lengths, options.max_tokens).items()
    }
    rows = make_rows(equal, options.seed)
    parts = cut_by_length(equal, options.max_tokens, FEWEST_PASSES)
    ways[EQUAL] = (False, [collate([rows[i] for i in part], source=None) for part in parts])

    policy = make_policy(options.hidden_size, options.layers)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, (packed, passes) in ways.items():
            took = seconds(policy, passes, packed=packed, train=options.train)
            if turn:
                times[name].append(took)

    parameters = sum(p.numel() for p in policy.parameters())
    print(
        f"{options.rows} rows of {min(lengths)} to {max(lengths)} tokens, {parameters / 1e6:.0f} M "
        f"parameters, {torch.get_num_threads()} threads, median of {options.rounds} by turns"
    )
    for name, (packed, passes) in ways.items():
        computed = sum(lengths) if packed else sum(batch.input_ids.numel() for batch in passes)
        ratio = statistics.median(a / b for a, b in zip(times[name], times[EQUAL], strict=True))
        print(
            f"{name}: {len(passes)} passes, computed / real tokens {computed / sum(lengths):.2f}, "
            f"{statistics.median(times[name]):.2f} s ({min(times[name]):.2f} to "
            f"{max(times[name]):.2f}), {ratio:.2f} of {EQUAL}"
        )


if __name__ == "__main__":
    main()
