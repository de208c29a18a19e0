"""Whole runs of the command with vLLM: one that ends by itself, and those that are ended.

A run can be told to stop by any signal, to any of its processes, at any time. :data:`CELLS` is all
of that; ``make test-kills`` goes through it.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from holding import PLACES
from runs import Run, quickstart

IN_THE_ENGINE = ("boot", "sync", "stage")
VICTIMS = ("core", "worker", "engine", "trainer", "group")
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
CELLS = [
    cell
    for cell in itertools.product(PLACES, VICTIMS, SIGNALS)
    # Nobody is left who could remove vLLM's shared memory.
    if cell[1:] != ("group", "SIGKILL")
]


@pytest.fixture
def run_held(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[object]:
    """A function that starts a run and returns when it waits at a place."""
    runs: list[Run] = []

    def start(place: str, *, sigint_ignored: bool) -> Run:
        marker = tmp_path / "marker"
        holding = ["--model", "holding.HoldingModule"]
        for name, value in (("engine", "Engine"), ("task.scoring.reward", "Reward")):
            holding += [f"--data.init_args.{name}", f"holding.Holding{value}"]
        run = Run(
            quickstart(tiny_checkpoint, *holding, "--trainer.max_steps=1000"),
            tmp_path,
            environment={"COPRIS_TEST_PLACE": place, "COPRIS_TEST_MARKER": str(marker)},
            sigint_ignored=sigint_ignored,
        )
        runs.append(run)
        run.wait_until(marker.exists)
        return run

    yield start
    for run in runs:
        run.end()


def stop_at(run_held: object, tmp_path: Path, place: str, victim: str, number: str) -> None:
    assert callable(run_held)
    # The engine alone gets a SIGINT where the trainer, in a script's background, ignores it.
    engine_alone = victim in ("core", "worker", "engine")
    run: Run = run_held(place, sigint_ignored=engine_alone and number == "SIGINT")
    which = signal.Signals[number]
    if victim == "group":
        run.signal_group(which)
    elif victim == "trainer":
        # As if it were in the middle of a sync, which its end must not leave behind.
        (Path("/dev/shm") / f"copris-{run.process.pid}-test").mkdir()
        run.process.send_signal(which)
    else:
        for process in {
            "core": run.cores,
            "worker": run.workers,
            "engine": lambda: run.workers() + run.cores(),
        }[victim]():
            process.send_signal(which)
    time.sleep(1.0)
    if place not in IN_THE_ENGINE or number != "SIGKILL":
        (tmp_path / "marker.go").touch()  # whoever is held must come to see the signal
    status = run.wait()
    if victim == "trainer" and number == "SIGKILL":
        assert status == -signal.SIGKILL
    else:
        assert (Path("/dev/shm") / f"copris-{run.process.pid}-test").exists() == (
            victim == "trainer"
        )
        for left in Path("/dev/shm").glob(f"copris-{run.process.pid}-test"):
            left.rmdir()
    if engine_alone:
        assert status == 1, run.output()[-3000:]
        error = run.output().rpartition("copris_lightning.errors.")[2]
        assert error.startswith(("EngineError: ", "WeightSyncError: ")), run.output()[-3000:]
        # vLLM answers a call with its worker's death, or with its own.
        assert re.search("the engine died: |vLLM did not start: |: Worker .* died unexpe", error)
        assert "See root cause above" not in error
        if (victim, number) == ("core", "SIGKILL"):
            assert "EngineCore was killed by SIGKILL" in error
        if victim == "worker" and place != "boot":
            assert "Worker" in error
    else:
        assert status != 0
    run.assert_nothing_left()


@pytest.mark.kills
@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_run_that_is_stopped_anywhere_leaves_nothing_behind(
    run_held: object, tmp_path: Path, cell: tuple[str, str, str]
) -> None:
    stop_at(run_held, tmp_path, *cell)


@pytest.mark.engines
def test_the_quickstart_config_runs_and_sums_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(quickstart(tiny_checkpoint, "--trainer.max_steps=3"), tmp_path)
    assert run.wait() == 0, run.output()[-3000:]
    summary = run.output().rpartition("batches trained")[2]
    for line in ("reward", "trained tokens/s", "stage time", "carried over", "mixed versions"):
        assert line in summary
    assert "runs/quickstart/version_0" in summary
    worst = float(summary.split("worst parity")[1].split()[0])
    assert worst < 1e-4
    run.assert_nothing_left()


@pytest.mark.kills
def test_a_development_run_ends_cleanly(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(
        quickstart(
            tiny_checkpoint,
            "--trainer.fast_dev_run=true",
            "--trainer.logger=false",
            "--trainer.limit_val_batches=0",
        ),
        tmp_path,
    )
    assert run.wait() == 0, run.output()[-3000:]
    run.assert_nothing_left()
    # fast_dev_run leaves no logs and no ledger either.
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


@pytest.mark.kills
def test_an_exception_in_the_reward_ends_the_engine_too(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    reward = ["--data.init_args.task.scoring.reward=some_rewards.FailingReward"]
    run = Run(
        quickstart(tiny_checkpoint, *reward, "--data.init_args.task.scoring.reward.after=4"),
        tmp_path,
    )
    assert run.wait() == 1
    assert "RewardError: the reward of prompt 'div-" in run.output()
    assert "KeyError('the answer is missing')" in run.output()
    run.assert_nothing_left()


@pytest.mark.parametrize("here", [signal.SIG_IGN, signal.SIG_DFL])
@pytest.mark.parametrize("ignored", [True, False])
def test_a_runs_sigint_does_not_depend_on_who_starts_the_tests(
    tmp_path: Path, here: signal.Handlers, ignored: bool
) -> None:
    import sys

    code = (
        "import signal, os; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, os.getpid())"
    )
    before = signal.signal(signal.SIGINT, here)
    try:
        run = Run([sys.executable, "-c", code], tmp_path, sigint_ignored=ignored)
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.wait() == 0
    assert run.output().split() == [str(ignored), str(run.process.pid)]
    assert os.getpid() != run.process.pid
