"""The benchmarks: their command lines are understood, and they report what was measured."""

from __future__ import annotations

import csv
import importlib.util
import re
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


def test_the_schedulers_benchmark_prints_a_line_for_each_number_in_flight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--in-flight", "100", "1000", "--chunks", "4000", "--turns", "2", "--held", "2000"]
    monkeypatch.setattr("sys.argv", ["scheduler.py", *arguments])
    load("scheduler").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"100 in flight: -?\d+\.\d us per chunk", lines[0])
    assert re.fullmatch(r"1,000 in flight: -?\d+\.\d us per chunk", lines[1])
    held = re.fullmatch(r"(\d+\.\d) bytes per token held", lines[2])
    assert held is not None
    assert 8 <= float(held[1]) < 200


@pytest.mark.parametrize("more", [[], ["--train"]])
def test_packed_padded_and_equal_rows_are_timed_side_by_side(
    more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    load("scoring").main(["--hidden-size=64", "--layers=1", "--rounds=1", *more])
    head, *lines = capsys.readouterr().out.splitlines()
    assert re.match(r"64 rows of 4\d to 4\d\d tokens", head)
    pattern = (
        r"(.*): (\d+) passes, computed / real tokens ([\d.]+), [\d.]+ s \(.*\), "
        r"[\d.]+ of equal rows"
    )
    found = {m[1]: (int(m[2]), float(m[3])) for m in (re.fullmatch(pattern, x) for x in lines) if m}
    assert list(found) == ["packed", "cut by length", "fewest passes", "equal rows"]
    assert found["packed"] == (2, 1.0)
    assert found["equal rows"][1] == 1.0
    assert 1.0 < found["cut by length"][1] < found["fewest passes"][1]
    assert found["fewest passes"][0] < found["cut by length"][0]
