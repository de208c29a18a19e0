"""What a cap that follows the KV cache gains, on a cache that is too small for the fixed one.

    python benchmarks/cap.py [--most 64] [--fixed 16 24 32] [--simulated]

Responses are those of `rollout.py`, and so is the engine, but for its KV cache: that holds a third
of what as many trajectories as the largest cap have on average, blocks included. All caps run by
turns on one engine, "staged fresh", each with the trajectories that it carries from turn to turn;
vLLM's statistics are on for all of them. The first batches are not counted, while the limit finds
its place.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from harness import Report, Table, by_turns, parse, parser, picked
from models import quiet
from rollout import VOCAB, WAYS, Bench, Lane
from workload import PROMPT_TOKENS, Lengths, ReplayedSimulation, ReplayedVLLM

from copris_lightning.core.cap import Cap
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.simulated_tokens import KVCache, StepTime

TOKEN_BYTES = 2 * 3 * 2 * 32 * 4
"""Of keys and values: layers x heads of the model in `rollout.py`, 32 wide, in float32."""

AUTO = "auto"


def held(lengths: Lengths, block: int) -> float:
    """Tokens of cache that a trajectory in flight has on average, in whole blocks: of those in
    flight at some moment, a long one is found more often, and anywhere on its way."""
    rng = random.Random(0)
    drawn = [lengths(rng.getrandbits(63)) for _ in range(20_000)]
    found = rng.choices(drawn, weights=drawn, k=20_000)
    tokens = [PROMPT_TOKENS + 1 + int(rng.random() * length) for length in found]
    return fmean(-(-n // block) * block for n in tokens)


class SmallCache(Bench):
    """The engine of all caps."""

    def _new_engine(self) -> Any:
        options = self.options
        lengths = Lengths(options.median, options.sigma, options.limit)
        block = 1 if options.simulated else options.block
        least = -(-(PROMPT_TOKENS + lengths.limit) // block) * block + block
        tokens = max(least, int(options.most * held(lengths, block) * options.share))
        tokens = tokens // block * block
        print(f"a KV cache of {tokens:,} tokens", flush=True)
        if options.simulated:
            return ReplayedSimulation(
                step_time=StepTime(1.5e-3, 3e-5), kv_cache=KVCache(tokens, options.prefix_s)
            )
        arguments = {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": block,
            "kv_cache_memory_bytes": tokens * TOKEN_BYTES,
            "stream_interval": options.stream_interval,
        }
        return ReplayedVLLM(arguments)

    def _spec(self, model: str, context: int) -> EngineSpec:
        options = self.options
        return EngineSpec(model, options.most, context, VOCAB, min_num_seqs=options.least)


class CapLane(Lane):
    """Tells what the cap did, too."""

    def turn(self, settle: int, batches: int) -> dict[str, float]:
        before, generated = self._preemptions(), self._generated
        figures = super().turn(settle, batches)
        tokens = self._generated - generated
        figures["preempted"] = 1000 * (self._preemptions() - before) / tokens
        figures["limit"] = self.limit
        return figures

    def _preemptions(self) -> int:
        load = self._bench.engine.load()
        return 0 if load is None else int(load.preemptions)


def caps(options: argparse.Namespace) -> dict[str, Cap]:
    """All caps by name, the one that follows the load last."""
    fixed = {f"cap {n}": Cap(n, n) for n in (*options.fixed, options.most)}
    return {**fixed, AUTO: Cap(options.least, options.most)}


def compare(bench: SmallCache, report: Report) -> None:
    """All caps."""
    options, named = bench.options, caps(bench.options)
    lanes = {name: CapLane(bench, WAYS["staged fresh"], cap) for name, cap in named.items()}
    for name, lane in lanes.items():
        lane.turn(options.steady * (2 if name == AUTO else 1), 1)
    turns = by_turns(
        {name: partial(lane.turn, 1, options.batches) for name, lane in lanes.items()},
        options.rounds,
    )
    largest = f"cap {options.most}"
    generated = picked(turns, "generated")
    report.add(Table("trained tokens/s", picked(turns, "trained"), (largest,)))
    report.add(Table("generated tokens/s", generated, (largest,)))
    fixed = tuple(name for name in named if name != AUTO)
    report.add(Table("generated tokens/s, against the best fixed cap", generated, fixed))
    for key, title in (
        ("preempted", "preemptions per 1,000 tokens"),
        ("limit", "limit at a turn's end"),
        ("sent", "prefix tokens sent again per token received"),
    ):
        report.add(Table(title, picked(turns, key), higher_is_better=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=3)
    line.add_argument("--most", type=int, default=64, help="the fixed cap that does not fit")
    line.add_argument("--least", type=int, default=8, help="where the following one begins")
    line.add_argument("--fixed", type=int, nargs="+", default=[16, 20, 24, 32], help="other caps")
    line.add_argument("--share", type=float, default=1 / 3, help="of what the lengths need")
    line.add_argument("--block", type=int, default=128, help="tokens of a KV block")
    line.add_argument("--prefix_s", type=float, default=2e-5, help="of a token, if simulated")
    line.add_argument("--trajectories", type=int, default=64, help="of a batch")
    line.add_argument("--batches", type=int, default=8, help="measured in a turn")
    line.add_argument("--steady", type=int, default=8, help="batches until it is steady")
    line.add_argument("--median", type=float, default=120.0)
    line.add_argument("--sigma", type=float, default=1.0)
    line.add_argument("--limit", type=int, default=1500)
    line.add_argument("--stream-interval", type=int, default=8)
    line.add_argument("--simulated", action="store_true", help="virtual time, no vLLM")
    quick = {"most": 16, "least": 2, "fixed": [4], "trajectories": 16, "batches": 3, "steady": 3}
    options = parse(line, arguments, {**quick, "median": 12.0, "limit": 120, "block": 32})
    quiet()
    report = Report("cap", options)
    with tempfile.TemporaryDirectory() as folder:
        bench = SmallCache(options, folder)
        try:
            compare(bench, report)
        finally:
            bench.close()
    report.write()


if __name__ == "__main__":
    main()
