"""Does a policy learn as much in each flow as it does synchronously? The quickstart, paired seeds.

Trains the same warm start in every flow with lags up to 2, and synchronously, with the plain
command line, and compares reward on held-out prompts seed by seed: at the end, and on average over
the tokens trained on. Finished runs are not repeated: the script can be stopped and started again.

    python benchmarks/learning.py --output docs/figures/learning.svg
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from staleness import ROOT, directory, fit, read

SEEDS = (0, 1, 2, 3, 4)
"""Fixed before the first run."""

BASELINE = "sync"
ARMS = {
    BASELINE: ["--data.init_args.flow.max_staleness=0"],
    "fresh": ["--data.init_args.flow.max_staleness=2"],
    "kept": ["--data.init_args.flow.max_staleness=2", "--data.init_args.flow.kv=kept"],
    "streaming, kept": [
        "--data.init_args.flow.max_staleness=2",
        "--data.init_args.flow.kv=kept",
        "--data.init_args.flow.mode=streaming",
    ],
}
"""Name of each arm, and the arguments that make it."""

HELD_OUT = "val/division/avg_at_k"
METRICS = (HELD_OUT, "train/tokens_per_s", "time/cycle_s", "staleness/lag_mean")
LAST = 3
"""Evaluations that make up the reward at the end."""

_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom."""

Points = list[tuple[float, float]]
"""Tokens trained on, and held-out reward."""


def train(runs: Path, arm: str, seed: int, *, cap: int, batches: int, every: int) -> None:
    """One run of an arm."""
    prompts = "copris_lightning.quickstart.task.DivisionPrompts"
    evaluations = {"division": {"prompts": {"class_path": prompts, "init_args": {"size": 512}}}}
    evaluations["division"]["prompts"]["init_args"]["seed"] = 2
    fit(
        directory(runs, arm, seed),
        *ARMS[arm],
        f"--seed_everything={seed}",
        f"--cap={cap}",
        f"--data.init_args.evaluations={json.dumps(evaluations)}",
        f"--trainer.max_steps={batches}",
        every=every,
    )


def points(target: Path, every: int) -> Points:
    """The learning curve of a run."""
    curve = read(target, METRICS)
    pairs = zip(curve["train/tokens_per_s"], curve["time/cycle_s"], strict=True)
    tokens = list(accumulate(rate * seconds for rate, seconds in pairs))
    return list(zip(tokens[every - 1 :: every], curve[HELD_OUT], strict=False))


def area(curve: Points, until: float) -> float:
    """Mean reward from the first evaluation to ``until`` trained tokens, between points a line."""
    tokens, rewards = zip(*curve, strict=True)
    return float(np.interp(np.linspace(tokens[0], until, 501), tokens, rewards).mean())


def final(curve: Points) -> float:
    """Mean reward of the last evaluations."""
    return statistics.fmean(reward for _, reward in curve[-LAST:])


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences, and its 95 % interval by Student's t."""
    mean = statistics.fmean(differences)
    count = len(differences)
    if count < 2:
        return mean, -math.inf, math.inf
    half = _T_975[count - 1] * statistics.stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def report(arms: dict[str, dict[int, Points]]) -> None:
    """Print each arm's reward at the end and its area, and how far they are from sync's."""
    print(
        f"{'arm':<17}{'seeds':>6}{'final':>8}{'area':>8}  difference to {BASELINE}, 95 % interval"
    )
    baseline = arms[BASELINE]
    for arm, curves in arms.items():
        paired = [seed for seed in curves if seed in baseline]
        until = {s: min(arms[a][s][-1][0] for a in arms if s in arms[a]) for s in paired}
        ends = {s: (final(curves[s]), area(curves[s], until[s])) for s in paired}
        others = {s: (final(baseline[s]), area(baseline[s], until[s])) for s in paired}
        means = [statistics.fmean(end[i] for end in ends.values()) for i in (0, 1)]
        line = f"{arm:<17}{len(paired):>6}{means[0]:>8.3f}{means[1]:>8.3f}"
        if arm != BASELINE:
            for i, name in enumerate(("final", "area")):
                mean, low, high = interval([ends[s][i] - others[s][i] for s in paired])
                line += f"  {name} {mean:+.3f} ({low:+.3f} to {high:+.3f})"
        print(line)


def draw(arms: dict[str, dict[int, Points]], output: Path) -> None:
    """Held-out reward over trained tokens: each seed thin, their mean at equal batches thick."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "copris"
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for number, (arm, curves) in enumerate(arms.items()):
        for curve in curves.values():
            axis.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.25, linewidth=0.8)
        columns = list(zip(*curves.values(), strict=False))
        mean = [[statistics.fmean(p[i] for p in column) for column in columns] for i in (0, 1)]
        axis.plot(*mean, color=f"C{number}", label=f"{arm} (n={len(curves)})")
    axis.set_xlabel("response tokens trained on")
    axis.set_ylabel("reward on held-out prompts")
    axis.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--cap", type=int, default=128, help="two batches in flight")
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="batches between evaluations")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures" / "learning.svg")
    args = parser.parse_args()
    if not args.plot_only:
        for seed in args.seeds:
            for arm in args.arms:
                train(args.runs, arm, seed, cap=args.cap, batches=args.batches, every=args.every)
    arms: dict[str, dict[int, Points]] = {}
    for arm in args.arms:
        targets = {seed: directory(args.runs, arm, seed) for seed in args.seeds}
        done = {seed: target for seed, target in targets.items() if (target / "done").exists()}
        if done:
            arms[arm] = {seed: points(target, args.every) for seed, target in done.items()}
    report(arms)
    draw(arms, args.output)


if __name__ == "__main__":
    main()
