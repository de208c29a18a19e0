"""Runs that could not write or have nothing to go on from: said before an engine boots."""

from __future__ import annotations

import fcntl
import re
from pathlib import Path
from typing import Any

import pytest
from small_runs import LOGGERS, boot, change, copris, settle

from copris_lightning import SimulatedEngine, VLLMEngine
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.errors import ConfigurationError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """A directory with a small config, ``run.yaml``."""
    monkeypatch.chdir(tmp_path)
    settle(tmp_path, tiny_checkpoint)
    return tmp_path


@pytest.fixture
def never_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedEngine, "start", boot)


@pytest.mark.usefixtures("never_boots")
@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_no_last_checkpoint_is_an_error_that_says_where_it_looked(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "lightning_logs" / "version_0" / "checkpoints").mkdir(parents=True)
    assert copris(command, "--ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert f"--ckpt_path=last: no checkpoint in {home}/lightning_logs/version_*/check" in error
    assert copris(command, "--ckpt_path=no/such.ckpt") == 2
    assert "--ckpt_path=no/such.ckpt: there is no such" in capsys.readouterr().err
    assert [p.name for p in (home / "lightning_logs").iterdir()] == ["version_0"]


@pytest.mark.usefixtures("never_boots")
@pytest.mark.parametrize(
    ("trainer", "options", "key"),
    [
        ({"logger": LOGGERS["csv"]}, [], "trainer.logger.init_args.save_dir"),
        ({"logger": LOGGERS["tensorboard"]}, [], "trainer.logger.init_args.save_dir"),
        ({"default_root_dir": "runs"}, [], "trainer.default_root_dir"),
        ({"logger": {"class_path": "small_runs.Plain"}}, [], "trainer.logger.init_args.save_dir"),
        (
            {},
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=runs/x"],
            r"trainer.callbacks \(ModelCheckpoint.dirpath\)",
        ),
        (
            {},
            ["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=runs"],
            r"trainer.callbacks \(OnExceptionCheckpoint.dirpath\)",
        ),
        (
            {},
            [
                "--trainer.callbacks+=copris_lightning.TrajectoryLedger",
                "--trainer.callbacks.directory=runs",
            ],
            "TrajectoryLedger.directory",
        ),
    ],
)
@pytest.mark.parametrize("command", ["fit", "predict"])
def test_directories_that_cannot_be_written_are_found_before_the_engine_boots(
    command: str,
    trainer: dict[str, Any],
    options: list[str],
    key: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "predict" and "Checkpoint" in key:
        options = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", *options]
        key = "trainer.logger.init_args.save_dir"  # it saves no checkpoints
    (home / "runs").write_text("a file")
    change(home, **trainer)
    assert copris(command, *options) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^copris: {key}: cannot write to {home}/runs\S* \(", error, re.M), error


@pytest.mark.usefixtures("never_boots")
def test_a_ledger_that_another_process_writes_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--trainer.callbacks+=copris_lightning.TrajectoryLedger"]
    options += ["--trainer.callbacks.directory=shared"]
    (home / "shared" / "ledger").mkdir(parents=True)
    with (home / "shared" / ".ledger.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert copris("fit", *options) == 2
    assert "shared/ledger: another run writes its ledger there now" in capsys.readouterr().err
    (home / "shared" / "ledger" / "batch_000000.jsonl").touch()
    assert copris("fit", *options) == 2
    assert "holds the ledger of another run" in capsys.readouterr().err


@pytest.mark.parametrize("directory", ["a file", "nowhere"])
def test_a_directory_for_weights_must_be_there_and_writable(directory: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    engine = VLLMEngine(sync_directory=str(tmp_path / directory))
    with pytest.raises(ConfigurationError, match=r"sync_directory=.* cannot"):
        engine.validate(EngineSpec("m", 8, 100, 98))
