"""How much faster carrying over is than synchronous RL, on the quickstart's task.

    python -m copris_lightning.quickstart.compare --run configs/quickstart.yaml

Trains the same model with the same seed in each way, by turns of a few batches, and prints trained
tokens/s, whole cycles counted: rollout, log-probs, training, sync. With an evaluation every turn, a
plot shows held-out reward over the time that each took.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from jsonargparse import auto_cli

from copris_lightning.quickstart.turns import Moment, train_by_turns

WAYS = {
    "sync": ["--data.init_args.flow.max_staleness=0"],
    "carry-over": [],
    "kept": ["--data.init_args.flow.kv=kept"],
    "streaming": [
        "--data.init_args.flow.mode=streaming",
        "--data.init_args.flow.max_staleness=2",
        "--data.init_args.flow.kv=kept",
    ],
}
"""What each way changes in the config. The first is what the others are compared with."""


def compare(
    run: str,
    *,
    ways: Sequence[str] = ("sync", "carry-over"),
    batches: int = 30,
    turn: int = 10,
    held_out: bool = False,
    seed: int = 0,
    output: str = "runs/compare",
) -> None:
    """Train by turns, print the comparison, and write it.

    Args:
        run: its config file.
        ways: which of ``sync`` (the first, always), ``carry-over``, ``kept`` and ``streaming``.
        batches: of each way, a multiple of ``turn``, at least two turns. The first turn is not
            counted in the rates: the engine warms up, and what is carried over builds up.
        turn: batches of a turn.
        held_out: evaluate after every turn, as the config says, and draw ``reward.svg``.
        seed: of everything.
        output: folder of the runs and of ``compare.json``.

    Raises:
        ValueError: a way that is not known, or too few batches.
    """
    if unknown := set(ways) - set(WAYS):
        raise ValueError(f"ways: {sorted(unknown)} is none of {', '.join(WAYS)}")
    if turn < 1 or batches % turn or batches < 2 * turn:
        raise ValueError(
            f"batches is {batches}: set batches to a multiple of turn ({turn}), two or more turns"
        )
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    commands = {
        way: [
            *(sys.executable, "-m", "copris_lightning", "fit", "--config", run, *WAYS[way]),
            f"--seed_everything={seed}",
            f"--trainer.max_steps={batches}",
            f"--trainer.logger.init_args.save_dir={folder}",
            f"--trainer.logger.init_args.name={way}",
            *(_evaluated(turn) if held_out else ()),
        ]
        for way in dict.fromkeys(("sync", *ways))
    }
    print(f"training {' and '.join(commands)}, {turn} batches each by turns", flush=True)
    runs = train_by_turns(commands, folder, batches=turn, turns=batches // turn)
    told = {way: [asdict(moment) for moment in moments] for way, moments in runs.items()}
    (folder / "compare.json").write_text(json.dumps({"turn": turn, "runs": told}) + "\n")
    print("\n".join(report(runs, turn)))
    if held_out:
        with suppress(ModuleNotFoundError):
            draw(runs, folder / "reward.svg")
            print(f"plot: {folder / 'reward.svg'}")


def report(runs: dict[str, list[Moment]], turn: int) -> list[str]:
    """A line per way: trained tokens/s after the first turn, their ratio, and reward."""
    rates = {way: rate(moments, turn) for way, moments in runs.items()}
    baseline = next(iter(rates.values()))
    lines = []
    for way, moments in runs.items():
        is_held_out = any(moment.held_out for moment in moments)
        rewards = [moment.reward for moment in moments if moment.held_out is is_held_out]
        width = 2 if is_held_out else turn
        start, end = (sum(part) / len(part) for part in (rewards[:width], rewards[-width:]))
        kind = "held-out reward" if is_held_out else "reward"
        lines.append(
            f"{way:<11} {rates[way]:>6,.0f} trained tokens/s, {rates[way] / baseline:.2f} times "
            f"sync's; {kind} {start:.3f} -> {end:.3f}"
        )
    return lines


def rate(moments: Sequence[Moment], turn: int) -> float:
    """Trained tokens/s after the first turn."""
    batches = [moment for moment in moments if not moment.held_out]
    first, last = batches[turn - 1], batches[-1]
    return (last.tokens - first.tokens) / (last.seconds - first.seconds)


def draw(runs: dict[str, list[Moment]], file: Path) -> None:
    """Held-out reward over the seconds that each way trained for.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for way, moments in runs.items():
        held_out = [moment for moment in moments if moment.held_out]
        axis.plot([m.seconds for m in held_out], [m.reward for m in held_out], label=way)
    axis.set_xlabel("seconds of training, rollout included")
    axis.set_ylabel("reward on held-out prompts")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _evaluated(every: int) -> list[str]:
    """What makes ``copris fit`` evaluate every so many micro-batches, of which the quickstart has
    one a batch."""
    return [
        "--trainer.limit_val_batches=1.0",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.check_val_every_n_epoch=null",
        f"--trainer.val_check_interval={every}",
    ]


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
