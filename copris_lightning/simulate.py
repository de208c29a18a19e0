"""`copris simulate`: how long a batch takes in every flow under a range of caps, without an engine.

docs/simulate.md says how to read it. What is computed is in :mod:`copris_lightning.core.timing`.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from copris_lightning.core.timing.comparison import Comparison, Row, best
from copris_lightning.core.timing.costs import Costs
from copris_lightning.core.timing.cycles import Sizes
from copris_lightning.core.timing.lengths import Lengths, LogNormal, Recorded
from copris_lightning.directories import unwritable
from copris_lightning.errors import ConfigurationError, under

# ---------------------------------------------------------------- options

_SECONDS = {
    "step_s": "of a decoding step, whatever is in it",
    "slot_s": "of a step, and per trajectory in flight",
    "kv_s": "of a step, and per token whose keys and values it reads",
    "prefix_s": "per token of a prompt, or of a response that is sent again",
    "train_s": "per token trained on, scoring included",
    "batch_s": "per batch trained on, whatever it holds",
    "sync_s": "of new weights, while the engine is held",
}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _counts(text: str) -> list[int]:
    found = _literal(text)
    values = found if isinstance(found, list | tuple) else [found]
    if not values or not all(map(_is_count, values)):
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a whole number from 1 on, or a list of them: [64, 128]"
        )
    return list(dict.fromkeys(values))


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        found = _literal(text)
        if not isinstance(found, int) or isinstance(found, bool) or found < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} on")
        return found

    return parse


def _batch(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be GROUPSxSIZE, such as 64x8")
    return int(found[1]), int(found[2])


def _numbers_by_count(text: str) -> dict[int, float]:
    found = _literal(text)
    if (
        not isinstance(found, dict)
        or not found
        or not all(_is_count(key) and _is_positive(value) for key, value in found.items())
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} must map whole numbers to numbers above 0: {{8: 4100, 64: 18800}}"
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="copris simulate",
        usage="%(prog)s --lengths L --limit N --batch BxG --caps '[N, ...]' --step_s S [...]",
        description="Compute the seconds per batch of sync and of every flow, under each cap.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--lengths",
        required=True,
        help="lognormal:MEDIAN,SIGMA in tokens, or the directory of a run with a ledger",
    )
    parser.add_argument(
        "--limit", required=True, type=_counts, help="tokens of a response at most; or a list"
    )
    parser.add_argument("--batch", required=True, type=_batch, help="groups x their size: 64x8")
    parser.add_argument(
        "--caps", required=True, type=_counts, help="trajectories in flight: '[512, 1024]'"
    )
    parser.add_argument(
        "--prompt_tokens",
        type=_count(0),
        help="of a prompt (default: the ledger's mean, or 0)",
    )
    parser.add_argument(
        "--max_staleness",
        type=_count(0),
        help="bound on the lag of trained tokens, which flows that stream need (default: none)",
    )
    for name, what in _SECONDS.items():
        parser.add_argument(f"--{name}", type=float, help=f"seconds {what}")
    parser.add_argument(
        "--throughput",
        type=_numbers_by_count,
        help="instead of --step_s and --slot_s: tokens/s by numbers in flight, "
        "'{8: 4100, 64: 18800}'",
    )
    parser.add_argument(
        "--measured",
        type=_numbers_by_count,
        help="instead of --train_s and --prefix_s: two measured gains of staged, fresh over sync, "
        "by limits, under the one cap: '{8192: 1.25, 40960: 2.27}'",
    )
    parser.add_argument("--batches", type=_count(1), default=20, help="(default: %(default)s)")
    parser.add_argument(
        "--warm_up", type=_count(0), default=10, help="batches before these (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_count(0), default=0, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file to write everything to")
    return parser


# ---------------------------------------------------------------- what is read

_LOG_NORMAL = re.compile(r"lognormal:([^,]+),([^,]+)")


def read_lengths(given: str) -> tuple[Lengths, int]:
    """What ``--lengths`` means: lengths of responses, and the mean one of prompts.

    Raises:
        ConfigurationError: it is neither a distribution nor a run with a ledger.
    """
    found = _LOG_NORMAL.fullmatch(given)
    if found is None:
        return read_ledger(Path(given))
    try:
        median, sigma = float(found[1]), float(found[2])
    except ValueError:
        raise ConfigurationError(f"{given!r} must be lognormal:MEDIAN,SIGMA") from None
    return LogNormal(median, sigma), 0


def read_ledger(directory: Path) -> tuple[Recorded, int]:
    """The responses that a run trained on, by groups, and the mean length of its prompts.

    Args:
        directory: the run's, or the ledger itself.

    Raises:
        ConfigurationError: there is none, or it cannot be read.
    """
    files = [*directory.glob("batch_*.jsonl"), *directory.glob("ledger/batch_*.jsonl")]
    groups: dict[tuple[Any, Any], list[int]] = {}
    cut_at, prompts = 0, 0
    for file in sorted(files):
        for number, line in enumerate(_lines(file), 1):
            try:
                row = json.loads(line)
                length = int(row["response_tokens"])
                groups.setdefault((row["batch"], row["prompt_id"]), []).append(length)
                prompts += int(row["prompt_tokens"])
                cut_at = max(cut_at, length if row["finish_reason"] == "length" else 0)
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigurationError(
                    f"{file}:{number} is no line of a ledger ({error!r})"
                ) from None
    if not groups:
        raise ConfigurationError(
            f"{str(directory)!r} is neither lognormal:MEDIAN,SIGMA nor a run with a ledger "
            "(ledger/batch_*.jsonl)"
        )
    lengths = list(groups.values())
    return Recorded(lengths, cut_at or None), round(prompts / sum(map(len, lengths)))


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error})") from error


def _costs(given: argparse.Namespace) -> Costs:
    """Of all flags for seconds.

    Raises:
        ConfigurationError: too few are given, or two for the same.
    """
    seconds = {name: getattr(given, name) for name in _SECONDS}
    for one, others in (
        ("throughput", ("step_s", "slot_s")),
        ("measured", ("train_s", "prefix_s")),
    ):
        for other in others:
            if getattr(given, one) is not None and seconds[other] is not None:
                raise ConfigurationError(f"{other}={seconds[other]} is what --{one} gives")
    if given.throughput is None and seconds["step_s"] is None:
        raise ConfigurationError("step_s or --throughput is needed: what decoding takes")
    steps = [(n, n / rate) for n, rate in sorted((given.throughput or {}).items())]
    return Costs(steps=steps, **{name: value or 0.0 for name, value in seconds.items()})


def _check_measured(given: argparse.Namespace) -> None:
    for wrong, message in (
        (len(given.measured) != 2, "must hold two gains: two costs are found"),
        (len(given.caps) != 1, f"was measured under one cap, not under --caps={given.caps}"),
        (given.throughput is not None, "needs --step_s in place of --throughput"),
    ):
        if wrong:
            raise ConfigurationError(f"measured={given.measured} {message}")


# ---------------------------------------------------------------- what is printed


def table(rows: Sequence[Row]) -> list[str]:
    """A line per limit and cap: seconds per batch of each flow, and its gain."""
    lines: dict[tuple[int, int], str] = {}
    for row in rows:
        cell = f"{_short(row.cycle.seconds)} s {row.gain:5.2f}x"
        lines[row.limit, row.cap] = lines.get((row.limit, row.cap), "") + f"{cell:>18}"
    names = dict.fromkeys(row.flow for row in rows)
    head = f"{'limit':>8}{'cap':>7}" + "".join(f"{name:>18}" for name in names)
    return [head, *(f"{limit:>8}{cap:>7}{line}" for (limit, cap), line in lines.items())]


def verdict(rows: Sequence[Row]) -> str:
    """The best cap of each flow under a limit, what it gains, and how old the tokens are."""
    found = (row for row in best(rows).values() if row.flow != "sync")
    parts = [
        f"{row.flow} {row.cap} ({row.gain:.2f}x, lag {row.cycle.lag_mean:.1f})" for row in found
    ]
    return f"best cap, limit {rows[0].limit}: {', '.join(parts)}"


def _short(seconds: float) -> str:
    """Three or more significant digits."""
    return f"{seconds:.{max(0, 2 - math.floor(math.log10(seconds)))}f}" if seconds else "0"


def _plain(row: Row) -> dict[str, Any]:
    cycle = {**asdict(row.cycle), "work": row.cycle.work._asdict()}
    cycle["in_flight"] = row.cycle.in_flight
    return {"limit": row.limit, "cap": row.cap, "flow": row.flow, "gain": row.gain, **cycle}


def _run(given: argparse.Namespace) -> None:
    costs = _costs(given)
    with under("lengths"):
        lengths, prompt = read_lengths(given.lengths)
    cut_at = lengths.cut_at if isinstance(lengths, Recorded) else None
    for limit in given.limit:
        if cut_at is not None and limit > cut_at:
            raise ConfigurationError(
                f"limit={limit}: the ledger's responses were cut at {cut_at} tokens; how long they "
                "would have been is not known"
            )
    groups, size = given.batch
    prompt = prompt if given.prompt_tokens is None else given.prompt_tokens
    comparison = Comparison(
        lengths,
        Sizes(groups, size, max(given.limit), prompt),
        costs,
        batches=given.batches,
        warm_up=given.warm_up,
        seed=given.seed,
    )
    if given.measured is not None:
        _check_measured(given)
        comparison.calibrate(given.measured, given.caps[0], given.max_staleness)
        found = comparison.costs
        print(f"found: train_s={found.train_s:.3g}, prefix_s={found.prefix_s:.3g}")
    rows = [
        row
        for limit in given.limit
        for row in comparison.rows(limit, given.caps, given.max_staleness)
    ]
    print("\n".join(table(rows)))
    if given.max_staleness is None:
        print("Flows that stream need --max_staleness.")
    for limit in given.limit if len(given.caps) > 1 else ():
        print(verdict([row for row in rows if row.limit == limit]))
    if given.json is not None:
        costs_found = {f.name: getattr(comparison.costs, f.name) for f in fields(Costs)}
        report = {"costs": costs_found, "rows": [_plain(row) for row in rows]}
        try:
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise unwritable(given.json, "json", error) from error


def main(args: Sequence[str]) -> int:
    """Compute and print; returns the exit status. What cannot be is refused with status 2."""
    parser = _parser()
    given = parser.parse_args(args)
    try:
        _run(given)
    except ConfigurationError as error:
        parser.error(f"--{error}")
    return 0
