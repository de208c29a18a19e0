"""Is the policy gradient unbiased? Exactly, on the problem of ``enumeration.py``.

    python benchmarks/unbiasedness.py --output docs/figures/unbiasedness.svg

Prints the exact bias of every estimator, what sampling makes of it, and how both grow.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from enumeration import (
    ESTIMATORS,
    Problem,
    enumerate_trajectories,
    estimate,
    exact_gradient,
    gradient_of_each,
    make_problem,
    monte_carlo,
    noise,
    order,
    relative_bias,
    sample,
)

from copris_lightning.core.estimator.losses import ClippedPolicyLoss

COLORS = ("#777777", "#0072b2", "#56b4e9", "#e69f00", "#d55e00")
TABLE_SHIFTS = (0.01, 0.03, 0.1, 0.3, 1.0)
SAMPLED_SHIFT = 0.3
"""The shift of the figure's right half."""


def print_shifts(problem: Problem, samples: int, seed: int) -> None:
    """The exact bias, the sampled estimate's distance and the noise, by shift."""
    generator = torch.Generator().manual_seed(seed)
    exact = exact_gradient(problem)
    rows = {name: f"{name:<40}" for name in ("kl/behavior", "is/clip_fraction", *ESTIMATORS)}
    noises = {name: f"{name:<40}" for name in ESTIMATORS}
    for shift in TABLE_SHIFTS:
        drawn = sample(problem, shift, samples, generator)
        trajectories = enumerate_trajectories(problem, shift)
        per_token = trajectories.probabilities[:, None] / problem.length
        for name, estimator in ESTIMATORS.items():
            _, _, parts = estimate(problem, estimator, trajectories)
            gradients = gradient_of_each(problem, estimator, trajectories)
            distance = monte_carlo(gradients, drawn).distance(exact)
            bias = relative_bias(problem, estimator, shift)
            rows[name] += f"{bias:>8.1e} {f'({distance:.1f})':<8}"
            noises[name] += f"{noise(gradients, trajectories) / exact.norm():>8.1f}{'':9}"
            if estimator.loss == ClippedPolicyLoss():
                clipped = parts.clipped_low | parts.clipped_high
                rows["kl/behavior"] += f"{(per_token * parts.behavior_kl).sum():>8.1e}{'':9}"
                rows["is/clip_fraction"] += f"{(per_token * clipped).sum():>8.3f}{'':9}"
    header = f"{'shift':<40}" + "".join(f"{shift:>8}{'':9}" for shift in TABLE_SHIFTS)
    print(f"Relative bias, exact (and the distance of {samples:,} samples, in standard errors)\n")
    print(f"{header}  order")
    for name, row in rows.items():
        biased = name in ESTIMATORS and relative_bias(problem, ESTIMATORS[name], 0.01) > 1e-12
        print(row + (f"{order(problem, ESTIMATORS[name]):>7.3f}" if biased else ""))
    print("\nStandard deviation of one trajectory's estimate, in norms of the gradient, exact\n")
    print("\n".join([header, *noises.values()]))


def print_noise(shift: float = 1.0) -> None:
    """The price of the whole product: how it grows with the length."""
    print(f"\nThe same at shift {shift}, by length\n")
    rows = {name: f"{name:<40}" for name in ESTIMATORS}
    for length in (2, 3, 4):
        problem = make_problem(length=length)
        trajectories = enumerate_trajectories(problem, shift)
        for name, estimator in ESTIMATORS.items():
            deviation = noise(gradient_of_each(problem, estimator, trajectories), trajectories)
            rows[name] += f"{deviation / exact_gradient(problem).norm():>12.1f}"
    print(
        "\n".join([" " * 40 + "".join(f"{f'{n} tokens':>12}" for n in (2, 3, 4)), *rows.values()])
    )


def print_medians(
    title: str, columns: Sequence[tuple[str, float, int]], baseline: float | None, seeds: int
) -> None:
    """The exact bias over many random problems.

    Args:
        title: of the table.
        columns: a heading, a shift and a length each.
        baseline: as for :func:`make_problem`.
        seeds: how many problems.
    """
    table = []
    for _, shift, length in columns:
        problems = [make_problem(seed, length, baseline) for seed in range(seeds)]
        biases = [[relative_bias(p, e, shift) for e in ESTIMATORS.values()] for p in problems]
        table.append(torch.tensor(biases, dtype=torch.float64))
    print(f"\n{title}: relative bias, median of {seeds} random problems\n")
    print(f"{'':<40}" + "".join(f"{heading:>12}" for heading, _, _ in columns))
    for index, name in enumerate(ESTIMATORS):
        print(f"{name:<40}" + "".join(f"{b[:, index].median():>12.1e}" for b in table))
    for index in (1, 2):
        shares = [(b[:, index] < b[:, 0] - 1e-12).double().mean() for b in table]
        words = f"{tuple(ESTIMATORS)[index].split(' (')[0]}: nearer than none"
        print(f"{words:<40}" + "".join(f"{share:>12.0%}" for share in shares))


def draw(problem: Problem, output: Path, samples: int, seed: int, runs: int = 16) -> None:
    """The figure: exact bias by shift, and the error by the number of samples."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "unbiasedness", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    generator = torch.Generator().manual_seed(seed)
    exact = exact_gradient(problem).flatten()
    shifts = torch.logspace(-2, 0, 61, dtype=torch.float64)
    counts = torch.logspace(2, math.log10(samples), 9, dtype=torch.float64).long()
    trajectories = enumerate_trajectories(problem, SAMPLED_SHIFT)
    drawn = [sample(problem, SAMPLED_SHIFT, samples, generator) for _ in range(runs)]
    for color, (name, estimator) in zip(COLORS, ESTIMATORS.items(), strict=True):
        biases = [relative_bias(problem, estimator, float(shift)) for shift in shifts]
        if biases[-1] > 1e-12:
            dashed = (0, (4, 1.5)) if estimator.loss == ClippedPolicyLoss() else "solid"
            left.loglog(shifts, biases, color=color, linestyle=dashed, label=name)
        else:
            left.plot([], [], color=color, label=name)
        # What the error must be: the bias and the variance are both known.
        gradients = gradient_of_each(problem, estimator, trajectories)
        mean = trajectories.probabilities @ gradients
        variance = noise(gradients, trajectories) ** 2
        expected = ((mean - exact).square().sum() + variance / counts).sqrt() / exact.norm()
        right.loglog(counts, expected, color=color)
        # And what it is, over independent runs.
        errors = [
            [(monte_carlo(gradients, run[:count]).mean - exact).norm() for count in counts]
            for run in drawn
        ]
        measured = torch.tensor(errors).square().mean(dim=0).sqrt() / exact.norm()
        right.plot(counts, measured, ".", color=color)
    left.set(
        title="Bias, exact\n(the sequence ratio's is 0)",
        xlabel="shift of the logits per version",
        ylabel="$\\|E[g] - \\nabla J\\| \\; / \\; \\|\\nabla J\\|$",
    )
    left.legend(fontsize=8)
    right.set(
        title=f"Error of a sampled gradient, shift {SAMPLED_SHIFT}"
        f"\n(lines: exact; dots: {runs} runs)",
        xlabel="trajectories",
        ylabel="root mean square error $/ \\; \\|\\nabla J\\|$",
    )
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, metadata={"Date": None, "Creator": None})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Bias of the policy-gradient estimators.")
    parser.add_argument("--output", type=Path, help="where to draw the figure (svg)")
    parser.add_argument("--samples", type=int, default=1_000_000, help="trajectories")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--problems", type=int, default=100, help="for the medians")
    parser.add_argument("--quick", action="store_true", help="few samples and problems")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.problems = 1000, 2
    torch.set_num_threads(1)
    problem = make_problem()
    print_shifts(problem, arguments.samples, arguments.seed)
    print_noise()
    shifts = [(f"shift {shift}", shift, 3) for shift in TABLE_SHIFTS]
    lengths = [(f"{n} token" + "s" * (n > 1), 0.01, n) for n in (1, 2, 3, 4)]
    print_medians("By shift, 3 tokens", shifts, baseline=None, seeds=arguments.problems)
    print_medians("By length, shift 0.01", lengths, baseline=None, seeds=arguments.problems)
    print_medians(
        "By length, shift 0.01, no baseline", lengths, baseline=0.0, seeds=arguments.problems
    )
    if arguments.output is not None:
        draw(problem, arguments.output, arguments.samples, arguments.seed)
        print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
