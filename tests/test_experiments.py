"""The experiments among the benchmarks: what they run, and what they make of it."""

from __future__ import annotations

import csv
import importlib.util
import math
import statistics
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
                        writer.writerow({"val/division/avg_at_k": end + 0.1 * seed, "epoch": 0})
            curves.append(staleness.read(target))
        arms[arm] = curves
    staleness.report(arms)
    printed = capsys.readouterr().out
    assert "0.850 ± 0.071" in printed
    assert "0.950 ± 0.071" in printed
    staleness.draw(arms, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load("learning")


def test_each_flows_command_line_parses(
    learning: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from copris_lightning.__main__ import main

    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(learning, "fit", lambda target, *args, every: given.append(args))
    monkeypatch.chdir(ROOT)
    for arm in learning.ARMS:
        learning.train(tmp_path, arm, 3, cap=128, batches=100, every=10)
    for arguments in given:
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config=configs/quickstart.yaml", *arguments, "--print_config"])
        assert stop.value.code == 0


def test_flows_are_compared_with_sync_seed_by_seed(
    learning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Straight lines from 0.5, of 100 tokens a batch: what their ends and areas are is plain.
    gain = {"sync": (0.3, 0.1, 0.2), "fresh": (0.3, 0.1, 0.2), "kept": (0.2, 0.0, 0.2)}
    arms: dict[str, dict[int, Any]] = {arm: {} for arm in gain}
    for arm, gains in gain.items():
        for seed, more in enumerate(gains):
            target = tmp_path / f"{arm}-{seed}"
            target.mkdir()
            with (target / "metrics.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, learning.METRICS)
                writer.writeheader()
                for batch in range(1, 21):
                    writer.writerow({"train/tokens_per_s": 50, "time/cycle_s": 2})
                    if batch % 5 == 0:
                        writer.writerow({learning.HELD_OUT: 0.5 + more * (batch - 5) / 15})
            arms[arm][seed] = learning.points(target, 5)
    assert [tokens for tokens, _ in arms["sync"][0]] == [500, 1000, 1500, 2000]
    assert learning.area(arms["sync"][0], 1250) == pytest.approx(0.5 + 0.3 / 4)
    learning.report(arms)
    sync, fresh, kept = capsys.readouterr().out.splitlines()[1:]
    # The last three of four evaluations: at 1/3, 2/3 and all of the gain.
    assert sync.split() == ["sync", "3", f"{0.5 + 0.2 * 2 / 3:.3f}", "0.600"]
    assert "final +0.000 (+0.000 to +0.000)  area +0.000 (+0.000 to +0.000)" in fresh
    differences = [-0.1 * 2 / 3, -0.1 * 2 / 3, 0.0]
    half = 4.303 * statistics.stdev(differences) / math.sqrt(3)
    middle = statistics.fmean(differences)
    assert f"final {middle:+.3f} ({middle - half:+.3f} to {middle + half:+.3f})" in kept
    learning.draw(arms, tmp_path / "learning.svg")
    assert (tmp_path / "learning.svg").stat().st_size > 0
