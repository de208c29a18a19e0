"""Training end to end: trained tokens/s and reward of sync, of our ways, and of TRL.

    python benchmarks/end_to_end.py --seeds 5
    make bench-trl ARGS="--seeds 5"           # with TRL, in an environment of its own

Every turn is a run of its own, `copris fit` or trl_peer.py, on one config: same warm start,
prompts, reward, batch, optimizer and number of batches. A round has a seed. Starting, evaluations
and the first batches, in which what is carried over builds up, are not in the time.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from harness import Report, Table, by_turns, parse, parser

ROOT = Path(__file__).parents[1]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
TRL = "TRL"
WAYS: dict[str, dict[str, Any]] = {
    "sync": {"max_staleness": 0, "behavior_logprobs": "trainer"},
    "sync, log-probs": {"max_staleness": 0, "behavior_logprobs": "engine"},
    "staged fresh": {"behavior_logprobs": "trainer"},
    "staged fresh, log-probs": {"behavior_logprobs": "engine"},
    "staged kept": {"kv": "kept"},
    "streaming kept": {"mode": "streaming", "kv": "kept", "max_staleness": 2},
}
"""Settings of the flow; the rest of it is ``PLAIN``, and the config's cap and bound."""
PLAIN = {"mode": "staged", "kv": "fresh", "behavior_logprobs": "auto"}
BASELINES = ("sync", "sync, log-probs")
BY_DEFAULT = (*BASELINES, "staged fresh", "staged kept", "streaming kept", TRL)
SIMULATED = {
    "data.init_args.engine": {
        "class_path": "copris_lightning.SimulatedEngine",
        "init_args": {
            "lengths": {"median": 24, "sigma": 1.0},
            "step_time": {"t0": 0.02, "t1": 0.0002},
        },
    },
    "model.init_args.model": ".cache/tiny",
}
LAST_WORDS = 2000
"""Characters of the log of a run that failed."""


@dataclass(frozen=True)
class Run:
    """What a run logged.

    Attributes:
        seconds: of each batch.
        tokens: trained, of each batch.
        held_out: reward on the evaluation's prompts, by how many batches were trained.
    """

    seconds: list[float]
    tokens: list[float]
    held_out: dict[int, float]

    @classmethod
    def read(cls, file: Path) -> Run:
        """From Lightning's CSV, of which trl_peer.py writes some columns."""
        run = cls([], [], {})
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                if row["time/cycle_s"]:
                    run.seconds.append(float(row["time/cycle_s"]))
                    run.tokens.append(float(row["train/tokens_per_s"]) * run.seconds[-1])
                rewards = [
                    float(value)
                    for name, value in row.items()
                    if name.startswith("val/") and name.endswith("/avg_at_k") and value
                ]
                if rewards:
                    run.held_out[len(run.tokens)] = fmean(rewards)
        return run

    def rate(self, skip: int) -> float:
        """Trained tokens per second, after the first batches."""
        return sum(self.tokens[skip:]) / sum(self.seconds[skip:])

    def evaluated_tokens(self) -> float:
        """Trained up to the last evaluation."""
        return sum(self.tokens[: max(self.held_out)])

    def reward_after(self, tokens: float) -> float:
        """Held-out reward after so many trained tokens, between evaluations on a straight line."""
        points = [(sum(self.tokens[:n]), reward) for n, reward in sorted(self.held_out.items())]
        for (before, low), (after, high) in itertools.pairwise(points):
            if before <= tokens <= after:
                return low + (high - low) * (tokens - before) / (after - before)
        return points[0][1] if tokens < points[0][0] else points[-1][1]


def setting(config: Path, key: str, default: Any = None) -> Any:
    """A value of a config file."""
    value = yaml.safe_load(config.read_text("utf-8"))
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return default if value is None else value


def config_arguments(way: str, seed: int, options: argparse.Namespace) -> list[str]:
    """What a run is told of what it trains on; the same of all but for the flow."""
    changes: dict[str, Any] = {
        "seed_everything": seed,
        "trainer.max_steps": options.batches,
        **(SIMULATED if options.simulated else {}),
    }
    if way != TRL:
        flow = PLAIN | WAYS[way]
        changes |= {f"data.init_args.flow.{name}": value for name, value in flow.items()}
    return [f"--config={options.config}", *_as_options(changes)]


def logging_arguments(folder: Path, options: argparse.Namespace) -> list[str]:
    """Where `copris fit` writes, and when it evaluates."""
    updates = setting(options.config, "data.init_args.batch.updates", 1)
    steps = updates * setting(options.config, "trainer.accumulate_grad_batches", 1)
    changes = {
        "trainer.limit_val_batches": 1.0,
        "trainer.num_sanity_val_steps": 0,
        "trainer.check_val_every_n_epoch": None,
        "trainer.val_check_interval": options.every * steps,
    }
    return [
        *_as_options(changes),
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        "--trainer.logger.name=",
        "--trainer.logger.version=",
    ]


def _as_options(changes: dict[str, Any]) -> list[str]:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in changes.items()}
    return [f"--{key}={text}" for key, text in texts.items()]


def train(way: str, seed: int, folder: Path, options: argparse.Namespace) -> Run:
    """One run.

    Raises:
        RuntimeError: it failed; says how.
    """
    folder.mkdir(parents=True)
    config = config_arguments(way, seed, options)
    if way == TRL:
        command = [str(TRL_PYTHON), "benchmarks/trl_peer.py", f"--output={folder / 'metrics.csv'}"]
        command += [f"--every={options.every}", *config]
    else:
        command = [sys.executable, "-m", "copris_lightning", "fit", *config]
        command += logging_arguments(folder, options)
    log = folder / "log.txt"
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"{way} ended with {done.returncode}:\n{log.read_text()[-LAST_WORDS:]}")
    run = Run.read(folder / "metrics.csv")
    assert len(run.tokens) == options.batches, f"{way}: {len(run.tokens)} batches"
    print(f"  seed {seed}, {way}: {run.rate(options.skip):,.0f} trained tokens/s", flush=True)
    return run


def make_checkpoint(options: argparse.Namespace) -> None:
    """Make the model that all runs start from, unless the config names one of the user's."""
    from copris_lightning.quickstart.warm_start import tiny_model, warm_start

    if options.simulated:
        tiny_model(ROOT / ".cache" / "tiny")
    elif setting(options.config, "model.init_args.model") == ".cache/quickstart":
        warm_start(ROOT / ".cache" / "quickstart")


def tables(runs: dict[str, list[Run]], skip: int) -> list[Table]:
    """What is reported of the runs of each way, a round each."""
    rates = {way: [run.rate(skip) for run in of_one] for way, of_one in runs.items()}
    found = [Table("trained tokens/s", rates, BASELINES)]
    if TRL in runs:
        found.append(Table("trained tokens/s, against TRL", rates, (TRL,)))
    if not all(run.held_out for of_one in runs.values() for run in of_one):
        return found
    rounds = zip(*runs.values(), strict=True)
    least = [min(run.evaluated_tokens() for run in a_round) for a_round in rounds]
    equal = {
        way: [run.reward_after(tokens) for run, tokens in zip(of_one, least, strict=True)]
        for way, of_one in runs.items()
    }
    first, last = (
        {way: [run.held_out[which(run.held_out)] for run in of_one] for way, of_one in runs.items()}
        for which in (min, max)
    )
    return [
        *found,
        Table("held-out reward, first evaluation", first),
        Table("held-out reward at the end", last, BASELINES),
        Table("held-out reward after equal trained tokens", equal, BASELINES),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--seeds", dest="rounds", type=int, help="the same: each round has a seed")
    line.add_argument("--first-seed", type=int, default=0)
    line.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    line.add_argument("--batches", type=int, default=32, help="of each run")
    line.add_argument("--skip", type=int, default=6, help="batches whose time does not count")
    line.add_argument("--every", type=int, default=8, help="batches between evaluations")
    line.add_argument("--ways", nargs="+", default=list(BY_DEFAULT), choices=[*WAYS, TRL])
    line.add_argument("--simulated", action="store_true", help="no engine: nothing is learnt")
    options = parse(line, arguments, {"batches": 3, "skip": 1, "every": 2})
    if TRL in options.ways and not TRL_PYTHON.exists():
        print("without TRL: `make bench-trl` makes its environment")
        options.ways.remove(TRL)
    if not options.ways:
        line.error("--ways: none is left")
    make_checkpoint(options)
    report = Report("end_to_end", options)
    with tempfile.TemporaryDirectory() as folder:
        turns: dict[str, Callable[[], Run]] = {
            way: partial(_turn, way, itertools.count(options.first_seed), Path(folder), options)
            for way in options.ways
        }
        runs = by_turns(turns, options.rounds)
    for table in tables(runs, options.skip):
        report.add(table)
    report.write()


def _turn(way: str, seeds: itertools.count[int], folder: Path, options: argparse.Namespace) -> Run:
    seed = next(seeds)
    name = way.replace(" ", "_").replace(",", "")
    return train(way, seed, folder / f"{name}-{seed}", options)


if __name__ == "__main__":
    main()
