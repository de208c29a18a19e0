"""Runs that take turns: never two at once, and one that fails says where to look."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from newcomer import environment

from copris_lightning.quickstart.compare import rate, report
from copris_lightning.quickstart.turns import Moment, train_by_turns

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The simulated run, smaller, with an evaluation."""
    made = yaml.safe_load((ROOT / "configs" / "simulated.yaml").read_text())
    made["model"]["init_args"]["model"] = str(tiny_checkpoint)
    data = made["data"]["init_args"]
    data["task"]["sampling"]["max_new_tokens"] = 48
    data["flow"], data["batch"] = {"cap": 8}, {"groups": 2, "group_size": 2}
    prompts = {**data["task"]["prompts"], "init_args": {"size": 4, "seed": 2}}
    data["evaluations"] = {"division": {"prompts": prompts}}
    made["trainer"]["limit_val_batches"] = 0
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(made))
    return file


def test_two_runs_train_by_turns_and_are_compared(config: Path, tmp_path: Path) -> None:
    options = "--batches 6 --turn 2 --held_out true --output out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "copris_lightning.quickstart.compare"),
            *("--run", str(config), *options.split()),
        ],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"]
    for way, moments in runs.items():
        assert [m["batch"] for m in moments if not m["held_out"]] == [1, 2, 3, 4, 5, 6], way
        assert [m["batch"] for m in moments if m["held_out"]] == [2, 4, 6], way
        assert sorted(moments, key=lambda m: m["seconds"]) == moments
        # The rows of the ledger are the tokens that were told of.
        ledger = sorted((tmp_path / "out" / way / "version_0" / "ledger").glob("*.jsonl"))
        rows = [json.loads(line) for file in ledger for line in file.read_text().splitlines()]
        assert moments[-1]["tokens"] == sum(row["response_tokens"] for row in rows)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["sync", "carry-over"]
    assert "1.00 times sync's; held-out reward" in lines[1]
    assert (tmp_path / "out" / "reward.svg").exists()


def test_a_run_that_ends_before_its_time_is_named(tmp_path: Path) -> None:
    good = [sys.executable, "-c", "import time; time.sleep(600)"]
    bad = [sys.executable, "-c", "raise SystemExit('no such config')"]
    with pytest.raises(RuntimeError, match=r"the run 'bad' ended: see .*bad.log"):
        train_by_turns({"bad": bad, "good": good}, tmp_path, batches=1, turns=2)
    assert "no such config" in (tmp_path / "bad.log").read_text()


def test_rates_leave_the_first_turn_and_the_validations_out() -> None:
    moments = [
        Moment(1, 1.0, 10, 0.0),
        Moment(1, 1.0, 10, 0.1, held_out=True),
        Moment(2, 2.0, 30, 0.2),
        Moment(2, 2.0, 30, 0.3, held_out=True),
        Moment(3, 6.0, 90, 0.4),
    ]
    assert rate(moments, 1) == (90 - 10) / (6.0 - 1.0)
    assert rate(moments, 2) == (90 - 30) / (6.0 - 2.0)
    fast = [Moment(m.batch, m.seconds / 2, m.tokens, m.reward) for m in moments if not m.held_out]
    sync, other = report({"sync": moments, "other": fast}, 1)
    assert "16 trained tokens/s, 1.00 times sync's; held-out reward 0.200 -> 0.200" in sync
    assert "32 trained tokens/s, 2.00 times sync's; reward 0.000 -> 0.400" in other
