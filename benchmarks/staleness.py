"""Does cross-stage importance sampling matter? The quickstart task with staleness forced high.

Trains the same warm start under three arms and several seeds, with the plain command line, and
draws the reward curves with their spread. Finished runs are not repeated, so that the script can
be stopped and started again, and run with ``--plot-only`` on what there is.

    python benchmarks/staleness.py --seeds 0 1 2 3 4 --output docs/figures/staleness.svg
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARMS = {
    "cross-stage IS": [],
    "no IS": ["--config=configs/overlays/no_is.yaml"],
    "sync": ["--config=configs/overlays/sync.yaml"],
    # Without a ratio nothing is ever clipped either: this tells the two apart.
    "IS, not clipped": [
        '--model.init_args.estimator.loss={"class_path": "copris_lightning.ReinforceLoss", '
        '"init_args": {"max_weight": null}}',
    ],
}
"""Name of each arm, and the arguments that make it."""

Curve = dict[str, list[float]]
METRICS = (
    "val/division/avg_at_k",
    "train/reward",
    "staleness/lag_mean",
    "is/ess",
    "is/clip_fraction",
    "kl/behavior",
)
EVERY = 5
"""Batches between validations on held-out prompts: the batches themselves are a biased sample,
since short responses finish first."""


def directory(runs: Path, arm: str, seed: int) -> Path:
    """Where the run of an arm and a seed logs."""
    return runs / f"{arm.replace(' ', '_').replace(',', '')}-{seed}"


def train(runs: Path, arm: str, seed: int, *, cap: int, lr: float, batches: int) -> None:
    """One run of an arm."""
    fit(
        directory(runs, arm, seed),
        *ARMS[arm],
        f"--seed_everything={seed}",
        f"--cap={cap}",
        "--batch_groups=16",
        # Scoring a thousand trajectories in flight anew after each small batch takes longer.
        "--data.init_args.flow.behavior_logprobs=engine",
        "--data.init_args.evaluations.division.samples=2",
        f"--lr={lr}",
        f"--trainer.max_steps={batches}",
        every=EVERY,
    )


def fit(target: Path, *arguments: str, every: int) -> None:
    """`copris fit` on the quickstart, evaluated every so many batches, unless it is done."""
    if (target / "done").exists():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    command = [sys.executable, "-m", "copris_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += [
        *arguments,
        "--trainer.limit_val_batches=1.0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.check_val_every_n_epoch=null",
        f"--trainer.val_check_interval={every}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={target}",
        "--trainer.logger.name=",
        "--trainer.logger.version=",
    ]
    with (target / "log.txt").open("w") as log:
        subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    (target / "done").touch()


def read(target: Path, metrics: Sequence[str] = METRICS) -> Curve:
    """The logged metrics of a run, one value per batch."""
    curve: Curve = {name: [] for name in metrics}
    with (target / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name in metrics:
                if row.get(name):
                    curve[name].append(float(row[name]))
    return curve


def mean_and_spread(curves: list[list[float]]) -> tuple[list[float], list[float]]:
    """Mean and sample standard deviation over seeds, batch by batch."""
    columns = list(zip(*curves, strict=False))
    spread = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in columns]
    return [statistics.fmean(c) for c in columns], spread


def report(arms: dict[str, list[Curve]]) -> None:
    """Print the held-out reward at the end (last two validations) and what went with it."""
    print(f"{'arm':<17}{'seeds':>6}{'held-out reward':>18}{'lag':>7}{'ESS':>7}{'clipped':>9}")
    for arm, curves in arms.items():
        ends = [statistics.fmean(c["val/division/avg_at_k"][-2:]) for c in curves]
        spread = statistics.stdev(ends) if len(ends) > 1 else math.nan
        others = [
            statistics.fmean(statistics.fmean(c[name]) for c in curves)
            for name in ("staleness/lag_mean", "is/ess", "is/clip_fraction")
        ]
        print(
            f"{arm:<17}{len(curves):>6}{statistics.fmean(ends):>10.3f} ± {spread:.3f}"
            f"{others[0]:>7.2f}{others[1]:>7.3f}{others[2]:>9.4f}"
        )


def draw(arms: dict[str, list[Curve]], output: Path) -> None:
    """Held-out reward and lag by batch, mean over seeds with a band of one standard deviation."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "copris"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = (
        ("val/division/avg_at_k", "reward on held-out prompts", EVERY),
        ("staleness/lag_mean", "mean lag of trained tokens", 1),
    )
    for axis, (metric, label, every) in zip(axes, panels, strict=True):
        for arm, curves in arms.items():
            mean, spread = mean_and_spread([c[metric] for c in curves])
            batches = [every * (i + 1) for i in range(len(mean))]
            axis.plot(batches, mean, label=f"{arm} (n={len(curves)})")
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axis.fill_between(batches, low, high, alpha=0.2)
        axis.set_xlabel("batch (one optimizer step)")
        axis.set_ylabel(label)
    axes[0].legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--cap", type=int, default=1024, help="8 batches in flight")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "staleness")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "figures" / "staleness.svg")
    args = parser.parse_args()
    if not args.plot_only:
        for seed in args.seeds:
            for arm in args.arms:
                train(args.runs, arm, seed, cap=args.cap, lr=args.lr, batches=args.batches)
    arms: dict[str, list[Curve]] = {}
    for arm in args.arms:
        targets = [directory(args.runs, arm, seed) for seed in args.seeds]
        if curves := [read(target) for target in targets if (target / "done").exists()]:
            arms[arm] = curves
    report(arms)
    draw(arms, args.output)


if __name__ == "__main__":
    main()
