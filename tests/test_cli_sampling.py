"""Stops, evaluation and a checkpoint's own code, as settings of the command line."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from changed_models import with_own_code

from copris_lightning import Sampling
from copris_lightning.cli import CoprisCLI
from copris_lightning.policy.module import CoprisModule

SIMULATED = str(Path(__file__).parents[1] / "configs" / "simulated.yaml")


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def instantiate(*args: str) -> Any:
    return CoprisCLI(
        CoprisModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        args=["--config", SIMULATED, *args],
    )


def test_an_overlay_sets_what_ends_a_response_and_how_evaluation_samples(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    settings = {
        "task": {"sampling": {"stop": ["</answer>", "\n\n"], "stop_token_ids": [3]}},
        "evaluations": {
            "short": {
                "prompts": "copris_testing.SomePrompts",
                "sampling": {"temperature": 0, "max_new_tokens": 40},
            },
        },
    }
    overlay.write_text(yaml.safe_dump({"data": {"init_args": settings}}))
    args = ["--config", str(overlay), "--data.init_args.task.sampling.max_new_tokens", "90"]
    made = instantiate(*args, "--model.init_args.model", str(tiny_checkpoint)).datamodule.settings
    assert made.task.sampling == Sampling(1.0, 90, stop=["</answer>", "\n\n"], stop_token_ids=[3])
    assert made.sampling("short") == Sampling(0, 40)


def test_nobody_is_asked_on_a_terminal(tiny_checkpoint: Path, tmp_path: Path) -> None:
    own = str(with_own_code(tiny_checkpoint, tmp_path / "own"))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "copris_lightning", "fit", "--config", SIMULATED]
    try:
        run = subprocess.run(
            [*command, "--model.init_args.model", own],
            stdin=theirs,  # a terminal, at which nobody answers
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 2, run.stderr
    assert "configuration_own.py, modeling_own.py" in last
    assert "model.init_args.trust_remote_code=true" in last
    assert "Do you wish to run" not in run.stdout + run.stderr
