"""What padding costs when the trainer looks at responses of different lengths, and packing saves.

    python benchmarks/scoring.py                # the passes that recompute log-probs
    python benchmarks/scoring.py --train        # forward and backward, as a training step

Takes the same rows packed; padded and cut by length; padded in as few passes as hold them; and as
many real tokens in rows of one length, which need neither: what the others are compared with. By
turns in one process. The model is made from a config and untrained: what a pass costs does not
depend on its weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch
from harness import Report, Table, by_turns, parse, parser
from models import parameters, qwen3, rows

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.packing import pack
from copris_lightning.core.partition import cut_by_length
from copris_lightning.policy.policy import Policy

FEWEST_PASSES = 10**9
"""What a pass has to cost, in tokens, for any padding to be better than another pass."""
EQUAL = "equal rows"


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


def timed(
    policy: Policy, passes: Sequence[MicroBatch], *, packed: bool, train: bool
) -> Callable[[], float]:
    """Says how many seconds it takes to score them, or to train on them."""

    def seconds() -> float:
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

    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--rows", type=int, default=64)
    line.add_argument("--shortest", type=int, default=45)
    line.add_argument("--longest", type=int, default=450)
    line.add_argument("--max-tokens", type=int, default=16_384)
    line.add_argument("--hidden-size", type=int, default=768)
    line.add_argument("--layers", type=int, default=12)
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--train", action="store_true", help="backward passes, too")
    options = parse(line, arguments, {"hidden_size": 64, "layers": 1})

    rng = random.Random(options.seed)
    lengths = [rng.randint(options.shortest, options.longest) for _ in range(options.rows)]
    ways = {
        name: (packed, [collate([made[i] for i in part], source=None) for part in parts])
        for made in [rows(lengths, options.seed)]
        for name, (packed, parts) in cuts(lengths, options.max_tokens).items()
    }
    equal = equal_lengths(lengths)
    made = rows(equal, options.seed)
    parts = cut_by_length(equal, options.max_tokens, FEWEST_PASSES)
    ways[EQUAL] = (False, [collate([made[i] for i in part], source=None) for part in parts])

    model = qwen3(options.hidden_size, options.layers)
    policy = Policy(model.eval(), chunk_tokens=1024)
    policy.pack(policy.ask)
    variants = {
        name: timed(policy, passes, packed=packed, train=options.train)
        for name, (packed, passes) in ways.items()
    }
    computed = {
        name: [1.0 if packed else sum(b.input_ids.numel() for b in passes) / sum(lengths)]
        for name, (packed, passes) in ways.items()
    }
    report = Report("scoring", options)
    times = by_turns(variants, options.rounds, warm_up=1)
    work = "training on" if options.train else "scoring"
    title = f"{parameters(model) / 1e6:.1f} M parameters: seconds of {work} {options.rows} rows"
    report.add(Table(title, times, (EQUAL,), higher_is_better=False))
    report.add(Table("computed / real tokens", computed, higher_is_better=False))
    numbers = {name: [len(passes)] for name, (_, passes) in ways.items()}
    report.add(Table("passes", numbers, higher_is_better=False))
    report.write()


if __name__ == "__main__":
    main()
