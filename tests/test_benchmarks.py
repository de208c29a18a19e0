"""The benchmarks: each runs, in small, and says what it measured; what they share is right."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def staleness() -> ModuleType:
    return load("staleness")


def test_its_runs_are_command_lines_that_parse(
    staleness: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from copris_lightning.__main__ import main

    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> None:
        commands.append(command)

    monkeypatch.setattr(staleness, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    for arm in staleness.ARMS:
        staleness.train(tmp_path, arm, 3, cap=1024, lr=5e-4, batches=30)
        staleness.train(tmp_path, arm, 3, cap=1024, lr=5e-4, batches=30)  # done already
    assert len(commands) == 4
    monkeypatch.chdir(ROOT)
    for command in commands[1::2]:  # not all: parsing is slow
        assert command[1:3] == ["-m", "copris_lightning"]
        with pytest.raises(SystemExit) as stop:
            main([*command[3:], "--print_config"])
        assert stop.value.code == 0


def test_it_reports_and_draws_what_the_runs_logged(
    staleness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {}
    for arm, end in (("cross-stage IS", 0.8), ("sync", 0.9)):
        curves = []
        for seed in (0, 1):
            target = staleness.directory(tmp_path, arm, seed)
            target.mkdir(parents=True)
            with (target / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, [*staleness.METRICS, "epoch"])
                writer.writeheader()
                for batch in range(10):
                    row = dict.fromkeys(staleness.METRICS[1:], 0.5) | {"epoch": 0}
                    writer.writerow(row)
                    if batch % 5 == 4:
                        writer.writerow({"val/addition/avg_at_k": end + 0.1 * seed, "epoch": 0})
            curves.append(staleness.read(target))
        arms[arm] = curves
    staleness.report(arms)
    printed = capsys.readouterr().out
    assert "0.850 ± 0.071" in printed
    assert "0.950 ± 0.071" in printed
    staleness.draw(arms, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


# ---------------------------------------------------------------- each of them, in small


def quick(name: str, output: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Runs a benchmark as a user does. Its tables by their titles, with each variant's figures."""
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--output", str(output)]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True, timeout=280)
    text = (output / f"{name}.json").read_text()
    made = json.loads(text)
    assert made["benchmark"] == name
    assert made["machine"]["cores"] >= 1
    assert "torch" in made["machine"]
    assert str(output) not in text
    assert "<svg" in (output / f"{name}.svg").read_text()
    tables = {table["title"]: table["variants"] for table in made["tables"]}
    for title, variants in tables.items():
        for figures in variants.values():
            assert len(figures["rounds"]) in (1, made["options"]["rounds"]), title
            assert all(map(math.isfinite, figures["rounds"])), title
    return tables


def median(tables: dict[str, dict[str, Any]], title: str, variant: str) -> float:
    [found] = [variants for name, variants in tables.items() if title in name]
    return float(found[variant]["median"])


def check_rollout(tables: dict[str, dict[str, Any]]) -> dict[str, Any]:
    again = "prefix tokens computed again"
    assert median(tables, again, "sync") == 0 < median(tables, again, "staged fresh")
    trained, generated, against_uncut = list(tables.values())[:3]
    assert against_uncut["uncut, log-probs"]["ratio"] == 1
    for rates in (trained, generated):
        assert {"sync", "staged fresh", "uncut, log-probs"} <= set(rates)
        best = max(rates[name]["median"] for name in ("sync", "sync, log-probs"))
        for figures in rates.values():
            assert figures["ratio"] == pytest.approx(figures["median"] / best)
    for name in ("sync", "sync, log-probs"):  # nothing is left over
        assert trained[name]["median"] == pytest.approx(generated[name]["median"])
    return generated


def test_a_rollout_on_virtual_time_gains_and_comes_near_the_upper_bound(tmp_path: Path) -> None:
    rates = check_rollout(quick("rollout", tmp_path, "--simulated"))
    sync, fresh, uncut = (rates[name]["median"] for name in ("sync", "staged fresh", "uncut"))
    assert 1.2 * sync < fresh < 1.02 * uncut


@pytest.mark.engines
def test_a_rollout_on_the_real_engine(tmp_path: Path) -> None:
    check_rollout(quick("rollout", tmp_path))


def check_caps(tables: dict[str, dict[str, Any]]) -> None:
    assert list(tables["generated tokens/s"]) == ["cap 4", "cap 16", "auto"]
    assert tables["generated tokens/s"]["cap 16"]["ratio"] == 1
    assert median(tables, "preemptions", "cap 4") < median(tables, "preemptions", "cap 16")
    assert median(tables, "limit", "cap 16") == 16
    assert 2 < median(tables, "limit", "auto") < 16


def test_caps_are_compared_on_a_small_cache_on_virtual_time(tmp_path: Path) -> None:
    check_caps(quick("cap", tmp_path, "--simulated"))


@pytest.mark.engines
def test_caps_are_compared_on_a_small_cache_of_the_real_engine(tmp_path: Path) -> None:
    check_caps(quick("cap", tmp_path))


@pytest.mark.engines
def test_a_sync_is_timed_beside_a_copy_and_step_by_step(tmp_path: Path) -> None:
    tables = quick("sync", tmp_path)
    whole = next(v for title, v in tables.items() if title.endswith(": seconds"))
    steps = next(v for title, v in tables.items() if title.endswith("of each step"))
    total = sum(figures["rounds"][0] for figures in steps.values())
    assert total == pytest.approx(whole["sync"]["rounds"][0])
    assert whole["copy"]["median"] < whole["sync"]["median"]
    assert median(tables, "peak", "files, in weights") >= 1


def test_a_training_step_is_timed_beside_plain_transformers(tmp_path: Path) -> None:
    tables = quick("training_step", tmp_path)
    assert median(tables, "seconds of a step", "transformers") > 0
    assert median(tables, "seconds of a step", "ours") > 0


def test_a_resume_is_timed_beside_a_run_that_begins_anew(tmp_path: Path) -> None:
    tables = quick("resume", tmp_path)
    [title] = tables
    assert int(title.split(" in flight, ")[1].split(" tokens")[0].replace(",", "")) > 0
    assert median(tables, title, "resumed") > 0


def test_what_grows_is_measured_at_each_size(tmp_path: Path) -> None:
    stages, buffer = quick("scale", tmp_path).values()
    assert list(stages) == ["16 in flight", "32 in flight"]
    assert list(buffer) == ["2 groups", "4 groups"]


def test_the_scheduler_is_measured_at_each_number_in_flight(tmp_path: Path) -> None:
    tables = quick("scheduler", tmp_path)
    assert list(tables["us per chunk"]) == ["100 in flight", "1,000 in flight"]
    assert 8 <= median(tables, "bytes per token", "held") < 200


@pytest.mark.parametrize("more", [[], ["--train"]], ids=["scoring", "training"])
def test_packed_padded_and_equal_rows_are_timed_side_by_side(
    tmp_path: Path, more: list[str]
) -> None:
    tables = quick("scoring", tmp_path, *more)
    computed, passes = (
        {name: figures["median"] for name, figures in tables[title].items()}
        for title in ("computed / real tokens", "passes")
    )
    assert list(computed) == ["packed", "cut by length", "fewest passes", "equal rows"]
    assert computed["packed"] == 1 == computed["equal rows"]
    assert 1 < computed["cut by length"] < computed["fewest passes"]
    assert passes["fewest passes"] < passes["cut by length"]


def test_rewards_are_timed_in_every_pattern(tmp_path: Path) -> None:
    tables = quick("rewards", tmp_path)
    assert len(tables["calls/s"]) == 6
    assert median(tables, "ms of a call", "judged, burst") > 20


def test_unbiasedness_draws_its_figure(tmp_path: Path) -> None:
    figure = tmp_path / "figure.svg"
    command = [sys.executable, "benchmarks/unbiasedness.py", "--quick", "--output", str(figure)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "token ratio, clipped: nearer than none" in done.stdout
    assert "<svg" in figure.read_text()


# ---------------------------------------------------------------- what they share


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks' own modules can be imported, for one test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield
    for name in set(sys.modules) - before:
        if str(ROOT / "benchmarks") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.usefixtures("shared")
def test_variants_run_by_turns_every_other_round_in_reverse() -> None:
    harness = importlib.import_module("harness")
    ran: list[str] = []
    variants = {name: lambda name=name: ran.append(name) or len(ran) for name in "abc"}
    values = harness.by_turns(variants, 2, warm_up=1)
    assert "".join(ran) == "abccbaabc"
    assert values == {"a": [6, 7], "b": [5, 8], "c": [4, 9]}


@pytest.mark.usefixtures("shared")
def test_ratios_are_of_one_round_to_the_best_baseline() -> None:
    table = importlib.import_module("harness").Table
    values = {"ours": [30.0, 10.0, 90.0], "slow": [1.0, 1.0, 1.0], "fast": [10.0, 5.0, 30.0]}
    rates = table("tokens/s", values, ("slow", "fast", "absent"))
    assert (rates.baseline, rates.ratios("ours")) == ("fast", [3, 2, 3])
    times = table("seconds", values, ("slow", "fast"), higher_is_better=False)
    assert (times.baseline, times.ratios("ours")) == ("slow", [30, 10, 90])
    assert table("seconds", values).ratios("ours") == []
    assert "30 (10 to 90)" in str(rates)
    assert "3.00 (2.00 to 3.00)" in str(rates)


@pytest.mark.usefixtures("shared")
def test_every_response_ends_at_its_own_length_over_all_its_stages() -> None:
    from copris_lightning.core.buffer import CarryOverBuffer
    from copris_lightning.engines.engine import Decoding, EngineSpec
    from copris_lightning.rollout.scheduler import RolloutScheduler
    from copris_lightning.rollout.shared_engine import SharedEngine
    from copris_lightning.rollout.task import Task, trajectory_seed

    workload = importlib.import_module("workload")
    engine = workload.ReplayedSimulation()
    engine.length_of = lengths = workload.Lengths(median=20, sigma=1.0, limit=90)
    loop = engine.new_event_loop()
    loop.run_until_complete(engine.start(EngineSpec("none", 16, 200, 98)))
    buffer = CarryOverBuffer(limit=16, group_size=2, batch_groups=4, max_new_tokens=90)
    shared = SharedEngine(engine, 16)
    task = Task(
        workload.Prompts(),
        importlib.import_module("reward").reward,
        lambda ids: "",
        Decoding(),
        seed=3,
    )
    scheduler = RolloutScheduler(shared, buffer, task)

    async def stages() -> list[Any]:
        groups = []
        for version in range(1, 7):
            groups += (await scheduler.take())[0]
            await shared.hold()
            await shared.release(version)
        await scheduler.close()
        await engine.close()
        return groups

    rows = [t for group in loop.run_until_complete(stages()) for t in group.trajectories]
    loop.close()
    found = [t.response_length for t in rows]
    assert found == [lengths(trajectory_seed(3, t.group_id, t.sample)) for t in rows]
    assert any(len(t.segments) > 1 for t in rows)
    assert engine.sent_again > 0
    assert engine.cached == 0


@pytest.mark.usefixtures("shared")
def test_replayed_lengths_are_log_normal_up_to_the_limit() -> None:
    from copris_lightning.rollout.task import trajectory_seed

    lengths = importlib.import_module("workload").Lengths(median=120, sigma=1.0, limit=1500)
    drawn = [lengths(trajectory_seed(0, group, 0)) for group in range(4000)]
    assert statistics.median(drawn) == pytest.approx(120, rel=0.05)
    logs = [math.log(n) for n in drawn if n < 1500]
    assert statistics.stdev(logs) == pytest.approx(1.0, abs=0.05)
    assert min(drawn) >= 1
    assert max(drawn) == 1500
