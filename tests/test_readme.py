"""What the README says, typed by somebody who has only installed the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from newcomer import SIMULATED, SMALL, blocks, lay_traps, run, settle

LINES = [line for block in blocks("bash", ["README.md"]) for line in block.splitlines()]
[FIT] = [line for line in LINES if line.strip() == "copris fit --config my_run.yaml"]
[RESUME] = [line for line in LINES if "--ckpt_path last" in line]


@pytest.fixture
def home(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    settle(tmp_path, tiny_checkpoint)
    return tmp_path


def rows(directory: Path) -> list[dict[str, object]]:
    files = sorted(directory.glob("ledger/batch_*.jsonl"))
    assert [file.name for file in files] == [f"batch_{i:06d}.jsonl" for i in range(len(files))]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def fit_and_resume(home: Path, *options: str, **environment: str) -> None:
    """The README's first command, then the one that goes on with it."""
    first = run(FIT, home, *SMALL, *options, "--trainer.max_steps=2", **environment)
    assert first.returncode == 0, first.stderr[-3000:]
    [directory] = home.glob("lightning_logs/*")
    assert f"logs              {directory.relative_to(home)}" in first.stdout
    before = {file.name: file.read_bytes() for file in directory.glob("ledger/*.jsonl")}
    config = (directory / "config.yaml").read_bytes()
    assert len(before) == 2

    second = run(RESUME, home, *SMALL, *options, "--trainer.max_steps=3", **environment)
    assert second.returncode == 0, second.stderr[-3000:]
    assert f"checkpoint: {directory}/checkpoints/last.ckpt (step 2)" in second.stdout
    assert "1 batches trained" in second.stdout
    assert list(home.glob("lightning_logs/*")) == [directory]
    assert {name: (directory / "ledger" / name).read_bytes() for name in before} == before
    assert (directory / "config.yaml").read_bytes() == config
    assert (directory / "config_1.yaml").exists()
    trajectories = [(row["prompt_id"], row["sample"]) for row in rows(directory)]
    assert len(trajectories) == 3 * 4 * 2
    assert len(set(trajectories)) == len(trajectories)  # of 64 prompts, none comes again yet


def test_the_readmes_run_trains_and_its_resume_line_continues_the_ledger(home: Path) -> None:
    lay_traps(home)
    fit_and_resume(home, SIMULATED)


@pytest.mark.engines
@pytest.mark.boots(2)
def test_the_same_on_vllm_with_two_reward_workers(home: Path) -> None:
    lay_traps(home)
    options = ("--data.init_args.task.scoring.workers=2",)
    fit_and_resume(home, *options, VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")


PROMPTS = """
from copris_lightning import Prompt

class Mine:
    def __len__(self): return 64
    def __getitem__(self, i): return Prompt(f"mine {i}", text=f"{i}+{i}=", answer=str(2 * i))
"""


def test_other_ranks_find_modules_of_the_directory_too(home: Path) -> None:
    lay_traps(home)
    (home / "my_package" / "data").mkdir(parents=True)
    (home / "my_package" / "data" / "prompts.py").write_text(PROMPTS)
    (home / "my_task.py").write_text("async def score(response, prompt): return 1.0\n")
    yaml = (home / "my_run.yaml").read_text()
    (home / "my_run.yaml").write_text(
        yaml.replace("{class_path: my_task.ExactMatch}", "my_task.score")
    )
    options = (
        "--data.init_args.task.prompts=my_package.data.prompts.Mine",
        "--trainer.max_steps=2",
    )
    ddp = f"{FIT} --config configs/overlays/ddp.yaml"
    done = run(ddp, home, *SMALL, SIMULATED, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    [directory] = home.glob("lightning_logs/*")
    found = rows(directory)
    assert {str(row["prompt_id"]).split()[0] for row in found} == {"mine"}
    assert {row["reward"] for row in found} == {1.0}
    assert list(directory.glob("checkpoints/*.ckpt"))

    # The ranks agree on what they go on from.
    line = f"{RESUME.partition('#')[0]} --config configs/overlays/ddp.yaml"
    done = run(line, home, *SMALL, SIMULATED, *options[:1], "--trainer.max_steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(home.glob("lightning_logs/*")) == [directory]
    assert len(rows(directory)) == 3 * 4 * 2


def test_python_may_be_told_not_to_look_in_the_directory(home: Path) -> None:
    done = run(FIT, home, *SMALL, SIMULATED, PYTHONSAFEPATH="1")
    assert done.returncode == 2
    assert "No module named 'my_task'" in done.stderr
