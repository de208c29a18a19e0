"""What padding costs when the trainer scores responses of different lengths.

    python benchmarks/scoring.py

Scores the same rows in as few passes as hold them, padded to the longest, and in passes cut by
length, by turns in one process. The model is made from a config and untrained: what a pass costs
does not depend on its weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch
from harness import Report, Table, by_turns, parse, parser
from models import parameters, qwen3, rows

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.partition import cut_by_length
from copris_lightning.policy.policy import Policy

FEWEST_PASSES = 10**9
"""What a pass has to cost, in tokens, for any padding to be better than another pass."""


@torch.no_grad()
def seconds(policy: Policy, passes: Sequence[MicroBatch]) -> float:
    """How long scoring takes."""
    started = time.perf_counter()
    for batch in passes:
        policy(batch)
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--rows", type=int, default=64)
    line.add_argument("--shortest", type=int, default=45)
    line.add_argument("--longest", type=int, default=141)
    line.add_argument("--max-tokens", type=int, default=16_384)
    line.add_argument("--hidden-size", type=int, default=768)
    line.add_argument("--layers", type=int, default=12)
    line.add_argument("--seed", type=int, default=0)
    options = parse(line, arguments, {"rows": 32, "hidden_size": 64, "layers": 1})

    rng = random.Random(options.seed)
    lengths = [rng.randint(options.shortest, options.longest) for _ in range(options.rows)]
    scored = rows(lengths, options.seed)
    model = qwen3(options.hidden_size, options.layers)
    policy = Policy(model.eval(), chunk_tokens=1024)
    cuts = {
        "fewest passes": cut_by_length(lengths, options.max_tokens, FEWEST_PASSES),
        "cut by length": cut_by_length(lengths, options.max_tokens),
    }
    passes = {
        name: [collate([scored[i] for i in part], source=None) for part in parts]
        for name, parts in cuts.items()
    }
    padded = {
        name: [sum(batch.input_ids.numel() for batch in batches) / sum(lengths)]
        for name, batches in passes.items()
    }
    variants = {
        name: lambda batches=batches: seconds(policy, batches) for name, batches in passes.items()
    }
    report = Report("scoring", options)
    times = by_turns(variants, options.rounds, warm_up=1)
    title = f"{parameters(model) / 1e6:.1f} M parameters: seconds of scoring {options.rows} rows"
    report.add(Table(title, times, ("fewest passes",), higher_is_better=False))
    report.add(Table("padded / real tokens", padded, higher_is_better=False))
    numbers = {name: [len(batches)] for name, batches in passes.items()}
    report.add(Table("passes", numbers, higher_is_better=False))
    report.write()


if __name__ == "__main__":
    main()
