"""Whole runs of the command with vLLM, ended in every way: nothing may be left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from served import is_alive

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240


def command(checkpoint: Path, *args: str) -> list[str]:
    config = str(ROOT / "configs" / "quickstart.yaml")
    small = ["cap", "16", "batch_groups", "4", "group_size", "2", "max_new_tokens", "64"]
    pairs = zip(small[::2], small[1::2], strict=True)
    changes = [part for name, value in pairs for part in (f"--data.init_args.{name}", value)]
    return [
        sys.executable,
        "-m",
        "copris_lightning",
        "fit",
        "--config",
        config,
        "--model.init_args.model",
        str(checkpoint),
        *changes,
        *args,
    ]


class Run:
    """A command in a session of its own, with all processes it ever started."""

    def __init__(self, args: list[str], directory: Path) -> None:
        support = str(ROOT / "tests" / "support")
        self.log = directory / "log.txt"
        self.shared_before = set(os.listdir("/dev/shm"))
        self.process = subprocess.Popen(
            args,
            cwd=directory,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": support},
        )
        self.started: dict[int, psutil.Process] = {}

    def output(self) -> str:
        return self.log.read_text()

    def look(self) -> None:
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.started[child.pid] = child
        except psutil.NoSuchProcess:
            pass

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            self.look()
            assert self.process.poll() is None, self.output()[-3000:]
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.1)
        self.look()

    def is_rolling_out(self) -> bool:
        return "in flight" in self.output()

    def is_booting(self) -> bool:
        """The engine's core has begun to start its workers."""
        try:
            return any("EngineCore" in " ".join(p.cmdline()) and p.children() for p in self.alive())
        except psutil.NoSuchProcess:
            return False

    def alive(self) -> list[psutil.Process]:
        return [process for process in self.started.values() if is_alive(process)]

    def wait(self) -> int:
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.1)
        return self.process.returncode

    def assert_nothing_left(self) -> None:
        """No process (so no port of one) and no shared memory of the run survives it (for long)."""
        assert self.started, "no child process was ever seen"
        deadline = time.monotonic() + 20
        while alive := self.alive():
            assert time.monotonic() < deadline, (alive, self.output()[-3000:])
            time.sleep(0.1)
        deadline = time.monotonic() + 5
        while set(os.listdir("/dev/shm")) - self.shared_before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert set(os.listdir("/dev/shm")) - self.shared_before == set()


def test_a_development_run_ends_cleanly(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(
        command(
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


def test_the_quickstart_config_runs_and_sums_up(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run = Run(command(tiny_checkpoint, "--trainer.max_steps=3"), tmp_path)
    assert run.wait() == 0, run.output()[-3000:]
    summary = run.output().rpartition("batches trained")[2]
    for line in ("reward", "trained tokens/s", "stage time", "carried over", "mixed versions"):
        assert line in summary
    assert "runs/quickstart/version_0" in summary
    worst = float(summary.split("worst parity")[1].split()[0])
    assert worst < 1e-4
    run.assert_nothing_left()


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL", "SIGKILL while it boots"])
def test_a_run_that_is_stopped_leaves_nothing_behind(
    tiny_checkpoint: Path, tmp_path: Path, how: str
) -> None:
    run = Run(command(tiny_checkpoint, "--trainer.max_steps=1000"), tmp_path)
    run.wait_until(run.is_booting if "boots" in how else run.is_rolling_out)
    if how == "Ctrl-C":
        # As a terminal does it: the whole group gets the signal, the engine's processes too.
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.wait() == 1, run.output()[-3000:]
    else:
        # As if in the middle of a sync.
        (Path("/dev/shm") / f"copris-{run.process.pid}-test").mkdir()
        run.process.kill()  # not waited for: a zombie trainer is a dead trainer
    run.assert_nothing_left()
    run.process.wait()


def test_an_exception_in_the_reward_ends_the_engine_too(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    reward = ["--data.init_args.reward=some_rewards.FailingReward"]
    run = Run(command(tiny_checkpoint, *reward, "--data.init_args.reward.after=4"), tmp_path)
    assert run.wait() == 1
    assert "RewardError: the reward of prompt 'add-" in run.output()
    assert "KeyError('the answer is missing')" in run.output()
    run.assert_nothing_left()
