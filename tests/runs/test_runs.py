"""Where runs write, and what they go on from: whole runs on the simulated engine."""

from __future__ import annotations

import csv
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from simulated_fits import build, ledger
from small_runs import LOGGERS, batches, boot, change, copris, settle

from copris_lightning import RunSummary, SimulatedEngine, TrajectoryLedger
from copris_lightning.errors import ConfigurationError
from copris_lightning.runs.directory import Place, _claim, place_of
from copris_lightning.runs.resume import resolve


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """A directory with a small config, ``run.yaml``."""
    monkeypatch.chdir(tmp_path)
    settle(tmp_path, tiny_checkpoint)
    return tmp_path


@pytest.mark.parametrize("logger", LOGGERS)
def test_new_runs_get_directories_and_the_last_one_is_continued_in_its_own(
    logger: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(home, logger=LOGGERS[logger])
    parent = home / ("lightning_logs" if logger in ("none", "default") else "runs/mine")
    first, second = parent / "version_0", parent / "version_1"
    assert copris("fit") == 0
    assert f"logs              {os.path.relpath(first)}" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in first.glob("ledger/*.jsonl")}
    assert copris("fit", "--trainer.gradient_clip_val=0.5") == 0
    assert f"logs              {os.path.relpath(second)}" in capsys.readouterr().out
    # An evaluation has a directory of its own, without checkpoints.
    assert copris("predict", "--ckpt_path=last") == 0
    assert len((parent / "version_2" / "predictions.jsonl").read_text().splitlines()) == 4
    assert f"checkpoint: {second}/checkpoints/" in capsys.readouterr().out
    assert copris("fit", "--ckpt_path=last", "--trainer.max_steps=4") == 0
    out = capsys.readouterr().out
    assert f"no checkpoint in {parent / 'version_2'}" in out
    assert re.search(rf"checkpoint: {second}/checkpoints/\S+step=2.ckpt \(step 2\)", out)
    assert "2 batches trained" in out
    parts = re.search(
        r"^tokens +(\S+) generated \+ (\S+) restored = (\S+) trained"
        r" \+ (\S+) carried over \+ 0 dropped$",
        out,
        re.MULTILINE,
    )
    made, restored, trained, carried = (int(part.replace(",", "")) for part in parts.groups())
    assert made + restored == trained + carried
    files = (second / "ledger" / f"batch_{index:06d}.jsonl" for index in (2, 3))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert trained == sum(line["response_tokens"] for line in lines)
    assert f"logs              {os.path.relpath(second)}" in out
    assert batches(first) == [0, 1]
    assert batches(second) == [0, 1, 2, 3]
    assert {p.name: p.read_bytes() for p in first.glob("ledger/*.jsonl")} == before
    assert sorted(p.name for p in second.glob("config*")) == ["config.yaml", "config_1.yaml"]
    configs = [yaml.safe_load((d / "config.yaml").read_text()) for d in (first, second)]
    assert configs[0] != configs[1]
    assert configs[1]["trainer"]["gradient_clip_val"] == 0.5
    assert len(list(second.glob("checkpoints/*.ckpt"))) == 4
    assert sorted(p.name for p in parent.iterdir()) == [f"version_{i}" for i in range(3)]
    if logger == "csv":
        with (second / "metrics.csv").open() as file:
            steps = {int(row["step"]) for row in csv.DictReader(file) if row["train/reward"]}
        assert steps == {0, 1, 2, 3}
    if logger in ("tensorboard", "default"):
        assert len(list(second.glob("events.*"))) == 2


def test_auto_starts_where_there_is_none_goes_on_and_ends_well(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert copris("fit", "--ckpt_path=auto", "--trainer.max_steps=1") == 0
    assert "starting afresh" in capsys.readouterr().out
    assert copris("fit", "--ckpt_path=auto") == 0
    assert "1 batches trained" in capsys.readouterr().out
    monkeypatch.setattr(SimulatedEngine, "start", boot)
    assert copris("fit", "--ckpt_path=auto") == 0
    assert "nothing is left to train" in capsys.readouterr().out
    # Who asked for this checkpoint expects training.
    assert copris("fit", "--ckpt_path=last") == 2
    assert "step 2 and trainer.max_steps=2: nothing is left" in capsys.readouterr().err
    assert copris("fit", "--ckpt_path=last", "--trainer.max_steps=1") == 2
    assert "raise trainer.max_steps" in capsys.readouterr().err
    assert batches(home / "lightning_logs" / "version_0") == [0, 1]
    assert copris("fit", "--ckpt_path=best") == 2
    assert "--ckpt_path=best is what a run has saved" in capsys.readouterr().err


def test_batches_of_an_abandoned_branch_are_set_aside(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copris("fit", "--trainer.max_steps=4") == 0
    directory = home / "lightning_logs" / "version_0"
    old = {p.name: p.read_bytes() for p in directory.glob("ledger/*.jsonl")}
    [older] = directory.glob("checkpoints/*step=2.ckpt")
    for number in range(2):
        assert copris("fit", f"--ckpt_path={older}", "--trainer.max_steps=3") == 0
        aside = directory / "ledger" / f"abandoned_{number}"
        assert f"were moved to {aside}" in capsys.readouterr().out
        assert batches(directory) == [0, 1, 2]
        moved = ["batch_000002.jsonl", *(["batch_000003.jsonl"] if number == 0 else [])]
        assert sorted(p.name for p in aside.iterdir()) == moved
    first = directory / "ledger" / "abandoned_0"
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {n: old[n] for n in sorted(old)[2:]}


def test_a_checkpoint_outside_its_run_knows_where_that_is(home: Path) -> None:
    shared = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=kept"]
    shared += ["--trainer.callbacks.every_n_train_steps=2"]
    config = yaml.safe_load((home / "run.yaml").read_text())
    config["trainer"]["callbacks"].pop()
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    for name in ("mine", "yours"):
        change(home, logger={**LOGGERS["csv"], "init_args": {"save_dir": "runs", "name": name}})
        assert copris("fit", *shared) == 0
    change(home, logger=LOGGERS["csv"])
    # The newest file is the other name's.
    assert copris("fit", *shared, "--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert batches(home / "runs/mine/version_0") == [0, 1, 2, 3]
    assert batches(home / "runs/yours/version_0") == [0, 1]
    assert len(list(home.glob("runs/*/*"))) == 2


ON_EXCEPTION = {
    "class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint",
    "init_args": {"dirpath": "."},
}


def test_a_checkpoint_of_a_failed_run_is_used_when_asked_for_only(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(home, more_callbacks=[ON_EXCEPTION, {"class_path": "small_runs.Fails"}], max_steps=3)
    monkeypatch.setenv("FAIL_AT", "2")
    with pytest.raises(RuntimeError, match="on purpose"):
        copris("fit")
    saved = (home / "on_exception.ckpt").read_bytes()
    # What fails before it has trained has nothing to save.
    monkeypatch.setenv("FAIL_AT", "-1")
    for options in (["--ckpt_path=last"], []):
        with pytest.raises(RuntimeError, match="on purpose"):
            copris("fit", *options)
    assert (home / "on_exception.ckpt").read_bytes() == saved
    # A new run is new, and an evaluation deletes nothing.
    monkeypatch.setenv("FAIL_AT", "")
    assert copris("fit", "--trainer.max_steps=1") == 0
    assert copris("predict") == 0
    new = max((home / "lightning_logs").glob("*/ledger/batch_*.jsonl"), key=os.path.getmtime)
    assert new.name == "batch_000000.jsonl"
    assert (home / "on_exception.ckpt").read_bytes() == saved
    capsys.readouterr()
    assert copris("fit", "--ckpt_path=on_exception.ckpt") == 0
    first = home / "lightning_logs" / "version_0"
    assert f"logs              {os.path.relpath(first)}" in capsys.readouterr().out
    assert batches(first) == [0, 1, 2]


def test_a_job_that_slurm_started_again_goes_on_and_a_new_one_is_new(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert copris("fit") == 0
    [saved] = home.glob("lightning_logs/version_0/checkpoints/*step=2.ckpt")
    os.replace(saved, home / "hpc_ckpt_1.ckpt")
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = staticmethod(lambda: True)
    monkeypatch.setattr("copris_lightning.runs.resume.SLURMEnvironment.detect", slurm)
    for name, value in (("NTASKS", "1"), ("PROCID", "0"), ("LOCALID", "0"), ("NODEID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SLURMEnvironment.detect()
    assert copris("fit") == 0
    assert "checkpoint:" not in capsys.readouterr().out
    assert batches(home / "lightning_logs" / "version_1") == [0, 1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert copris("fit", "--trainer.max_steps=3") == 0
    assert f"checkpoint: {home / 'hpc_ckpt_1.ckpt'} (step 2)" in capsys.readouterr().out
    assert batches(home / "lightning_logs" / "version_0") == [0, 1, 2]


def test_no_two_processes_get_the_same_directory(tmp_path: Path) -> None:
    place = Place(tmp_path / "runs", None, "a key")
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(lambda _: _claim(place), range(64)))
    assert len(set(claimed)) == 64


def test_the_newest_checkpoint_is_found_whatever_its_form(tmp_path: Path) -> None:
    def saved(path: str, age: float, *, parts: tuple[str, ...] = ()) -> Path:
        file = tmp_path / "runs" / "mine" / path
        for part in parts or ("",):
            (file / part).parent.mkdir(parents=True, exist_ok=True)
            (file / part).touch()
            os.utime(file / part, (age, age))
        os.utime(file, (age, age))
        return file

    def last(**options: Any) -> Path:
        logger = TensorBoardLogger(tmp_path / "runs", "mine", **options)
        found = resolve(L.Trainer(logger=logger, accelerator="cpu"), "validate", "last")
        return Path(str(found))

    old = saved("version_9/checkpoints/epoch=0-step=100.ckpt", 2e9)
    tenth = saved("version_10/checkpoints/epoch=0-step=20.ckpt", 1e9)
    (tmp_path / "runs/mine/version_11/checkpoints").mkdir(parents=True)
    assert last() == tenth
    later = saved("version_10/checkpoints/epoch=0-step=100.ckpt", 1e9)
    assert last() == later  # by its step, where times are equal
    saved("version_10/checkpoints/step=200.ckpt", 3e9, parts=("half_written.distcp",))
    assert last() == later
    sharded = saved("version_10/checkpoints/step=300.ckpt", 1.5e9, parts=("meta.pt", "a.distcp"))
    assert last() == sharded
    metric = saved("version_10/checkpoints/val/avg=0.5.ckpt", 1.6e9)
    assert last() == metric
    deepspeed = saved("version_12/checkpoints/last.ckpt", 1, parts=("latest", "checkpoint/x.pt"))
    assert last() == deepspeed
    assert last(version=9) == old
    with pytest.raises(ConfigurationError, match=r"no checkpoint in .*runs/mine/version_8"):
        last(version=8)


def test_a_script_resumes_in_its_runs_directory_too(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(steps: int, **options: Any) -> None:
        save = ModelCheckpoint(every_n_train_steps=1)
        trainer, module, data, _ = build(
            tiny_checkpoint,
            tmp_path / "unused",
            callbacks=[save, RunSummary(), OnExceptionCheckpoint(tmp_path)],
            max_steps=steps,
            logger=False,
            default_root_dir=tmp_path,
            enable_checkpointing=True,
        )
        for callback in trainer.callbacks:
            if isinstance(callback, TrajectoryLedger):
                callback.directory = None
        trainer.fit(module, datamodule=data, **options)

    first, second = (tmp_path / "lightning_logs" / f"version_{i}" for i in range(2))
    fit(1)
    fit(2)
    [saved] = second.glob("checkpoints/*.ckpt")
    saved.rename(tmp_path / "on_exception.ckpt")
    fit(1)  # is new
    assert batches(tmp_path / "lightning_logs" / "version_2") == [0]
    fit(3, ckpt_path=tmp_path / "on_exception.ckpt")
    assert f"logs              {second}" in capsys.readouterr().out
    assert [batches(path) for path in (first, second)] == [[0], [0, 1, 2]]
    assert {row["batch"] for row in ledger(second)} == {0, 1, 2}
    with pytest.raises(ConfigurationError, match="nothing is left to train"):
        fit(1, ckpt_path="last")


def test_a_bucket_is_left_to_the_logger(tmp_path: Path) -> None:
    trainer = L.Trainer(
        logger=CSVLogger("memory://bucket/logs"), accelerator="cpu", default_root_dir=tmp_path
    )
    assert place_of(trainer).parent.is_relative_to(tmp_path)
