"""A run that SIGTERM ends says so: by its status, how far it came, and how to go on."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

from newcomer import SCRIPT, SIMULATED, SMALL, environment, run, settle

WITHOUT = "--trainer.callbacks=[{class_path: copris_lightning.WeightSync}]"


def stopped(home: Path, *options: str) -> tuple[int, str]:
    """Status and last line of a run that is told to stop when it has trained on a batch."""
    given = [*SMALL, SIMULATED, "--trainer.max_steps=100000", *options]
    command = [str(SCRIPT), "fit", "--config", "my_run.yaml", *given]
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=home, env=environment(), stdout=log, stderr=subprocess.STDOUT
        )
    while not list(home.glob("lightning_logs/*/events.*")):
        assert process.poll() is None, (home / "log.txt").read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(2.0)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    return status, (home / "log.txt").read_text().rstrip().splitlines()[-1]


def test_what_it_says_goes_on(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settle(tmp_path, tiny_checkpoint)
    status, last = stopped(tmp_path)
    assert status == 128 + signal.SIGTERM
    found = re.fullmatch(
        r"copris: fit was ended by SIGTERM after (\d+) optimizer steps of 100000; to go on: the "
        r"same command with (--ckpt_path .*\.ckpt)",
        last,
    )
    assert found, last
    options = [SIMULATED, f"--trainer.max_steps={int(found[1]) + 1}", *shlex.split(found[2])]
    done = run("copris fit --config my_run.yaml", tmp_path, *SMALL, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 batches trained" in done.stdout


def test_without_a_checkpoint_it_says_what_saves_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settle(tmp_path, tiny_checkpoint)
    status, last = stopped(tmp_path, WITHOUT, "--trainer.enable_checkpointing=false")
    assert status == 128 + signal.SIGTERM
    assert re.fullmatch(
        r"copris: fit was ended by SIGTERM after \d+ optimizer steps of 100000, without a "
        r"checkpoint: a ModelCheckpoint among trainer.callbacks with save_on_exception saves one",
        last,
    ), last
