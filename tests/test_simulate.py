"""`copris simulate`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulated_fits import build

from copris_lightning.__main__ import main
from copris_lightning.simulate import read_ledger

SMALL = {
    "lengths": "lognormal:100,1.0",
    "limit": "1000",
    "batch": "4x4",
    "caps": "[8, 16, 32]",
    "step_s": "0.02",
    "prefix_s": "1e-4",
    "train_s": "1e-4",
    "batches": "8",
    "warm_up": "4",
}


def options(**changed: str | None) -> list[str]:
    """The small plan with other values, or without some."""
    given = {**SMALL, **changed}
    return ["simulate", *(f"--{name}={value}" for name, value in given.items() if value)]


def test_it_prints_a_line_per_cap_and_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(max_staleness="3", json=str(tmp_path / "all.json"))) == 0
    head, *lines, verdict = capsys.readouterr().out.splitlines()
    names = ["sync", "staged fresh", "staged kept", "streaming fresh", "streaming kept"]
    assert " ".join(head.split()) == f"limit cap {' '.join(names)}"
    assert [line.split()[:2] for line in lines] == [["1000", cap] for cap in ("8", "16", "32")]
    assert len({len(line) for line in (head, *lines)}) == 1

    report = json.loads((tmp_path / "all.json").read_text())
    rows = report["rows"]
    assert [row["flow"] for row in rows] == names * 3
    assert report["costs"]["step_s"] == 0.02
    for row, line in zip(rows[::5], lines, strict=True):
        assert line.split()[2] == f"{row['seconds']:.1f}"
    fastest = max((row for row in rows if row["flow"] == "staged kept"), key=lambda r: r["gain"])
    assert verdict.startswith("best cap, limit 1000: staged fresh ")
    assert f"staged kept {fastest['cap']} ({fastest['gain']:.2f}x, lag " in verdict


def test_without_a_bound_nothing_streams(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(caps="[8, 16]")) == 0
    head, _, _, note, verdict = capsys.readouterr().out.splitlines()
    assert head.split() == ["limit", "cap", "sync", "staged", "fresh", "staged", "kept"]
    assert note == "Flows that stream need --max_staleness."
    assert "streaming" not in verdict


def test_of_one_cap_none_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(caps="8", limit="[500, 1000]", max_staleness="2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["limit", "cap"], ["500", "8"], ["1000", "8"]]


def test_a_run_can_be_planned_from_its_own_ledger(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, max_steps=6)
    trainer.fit(module, datamodule=data)
    [ledger] = tmp_path.glob("**/ledger")
    rows = [json.loads(line) for file in ledger.iterdir() for line in file.read_text().splitlines()]
    for directory in (ledger, ledger.parent):
        recorded, prompt = read_ledger(directory)
        assert sorted(n for group in recorded.groups for n in group) == sorted(
            row["response_tokens"] for row in rows
        )
        assert {len(group) for group in recorded.groups} == {2}
        assert prompt == round(sum(row["prompt_tokens"] for row in rows) / len(rows))
    cut = max(row["response_tokens"] for row in rows if row["finish_reason"] == "length")
    assert recorded.cut_at == cut
    capsys.readouterr()
    assert main(options(lengths=str(ledger), limit=str(cut), batch="4x2")) == 0
    assert f"best cap, limit {cut}: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(options(lengths=str(ledger), limit=str(cut + 1), batch="4x2"))
    assert f"--limit={cut + 1}: the ledger's responses were cut at {cut}" in capsys.readouterr().err


def test_measured_throughput_stands_for_the_time_of_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A step takes 0.02 s, whatever is in it.
    given = options(step_s=None, throughput="{32: 1600, 1: 50}")
    assert main(given) == 0
    measured = capsys.readouterr().out
    assert main(options()) == 0
    assert capsys.readouterr().out == measured


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"caps": None}, "the following arguments are required: --caps"),
        ({"caps": "[8, 0]"}, "argument --caps: '[8, 0]' must be a whole number from 1 on, or a"),
        ({"caps": "[8,"}, "argument --caps: '[8,' must be"),
        ({"caps": "[]"}, "argument --caps: '[]' must be"),
        ({"limit": "many"}, "argument --limit: 'many' must be a whole number"),
        ({"batch": "64"}, "argument --batch: '64' must be GROUPSxSIZE, such as 64x8"),
        ({"batches": "0"}, "argument --batches: '0' must be a whole number from 1 on"),
        ({"max_staleness": "-1"}, "argument --max_staleness: '-1' must be a whole number from 0"),
        ({"step_s": None}, "--step_s or --throughput is needed"),
        ({"step_s": "-1"}, "--step_s=-1.0 must be at least 0"),
        ({"train_s": "nan"}, "--train_s=nan must be at least 0"),
        ({"step_s": "fast"}, "argument --step_s: invalid float value: 'fast'"),
        ({"throughput": "{1: 50}"}, "--step_s=0.02 is what --throughput gives"),
        ({"throughput": "{1: -50}", "step_s": None}, "argument --throughput: '{1: -50}' must map"),
        ({"measured": "{500: 1.2}"}, "--train_s=0.0001 is what --measured gives"),
        ({"lengths": "lognormal:0,1"}, "--lengths.median=0.0 must be above 0"),
        ({"lengths": "lognormal:a,1"}, "--lengths: 'lognormal:a,1' must be lognormal:MEDIAN,SIGMA"),
        ({"lengths": "nowhere"}, "--lengths: 'nowhere' is neither lognormal:MEDIAN,SIGMA nor a"),
        ({"cap": "8"}, "unrecognized arguments: --cap=8"),
        ({"json": "nowhere/x.json"}, "--json: cannot write to nowhere/x.json (No such file"),
    ],
)
def test_what_cannot_be_is_refused_by_flag_and_value(
    changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(options(**changed))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"measured": "{500: 1.2}"}, "--measured={500: 1.2} must hold two gains"),
        ({"caps": "[8, 16]"}, "was measured under one cap, not under --caps=[8, 16]"),
        ({"throughput": "{1: 50}", "step_s": None}, "needs --step_s in place of --throughput"),
        ({"measured": "{500: 9, 1000: 1}"}, "--measured: no train_s and prefix_s of at least 0"),
    ],
)
def test_gains_that_cannot_be_calibrated_on_are_refused(
    changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {"train_s": None, "prefix_s": None, "caps": "32", "measured": "{500: 1.2, 1000: 1.4}"}
    with pytest.raises(SystemExit) as stop:
        main(options(**{**plan, **changed}))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[]", '{"batch": 0, "prompt_id": "a"}'])
def test_a_line_that_is_none_of_a_ledger_is_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "batch_000000.jsonl").write_text(line + "\n")
    with pytest.raises(SystemExit):
        main(options(lengths=str(tmp_path)))
    expected = f"--lengths: {tmp_path}/batch_000000.jsonl:1 is no line of a ledger"
    assert expected in capsys.readouterr().err


def test_a_ledger_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "batch_000000.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(SystemExit):
        main(options(lengths=str(tmp_path)))
    expected = f"--lengths: {tmp_path}/batch_000000.jsonl cannot be read"
    assert expected in capsys.readouterr().err


def test_it_needs_no_framework() -> None:
    code = (
        "import sys\nfrom copris_lightning.__main__ import main\n"
        f"main({options(caps='8')!r})\n"
        "print([m for m in ('lightning', 'transformers', 'vllm') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip().endswith("[]")
