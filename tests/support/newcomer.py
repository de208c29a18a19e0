"""A reader of the documents: an empty directory, the files of the README, the installed script."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).parent / "copris"

# The README's lengths are a real model's; the tiny one takes 512 tokens in all.
SMALL = [
    *("--max_prompt_tokens=64", "--max_new_tokens=64"),
    *("--cap=16", "--batch_groups=4"),
    *("--group_size=2", "--trainer.accumulate_grad_batches=2"),
    "--trainer.accelerator=cpu",
]
SIMULATED = "--data.init_args.engine=copris_lightning.SimulatedEngine"

SHADOWS = ("queue", "types", "tokenize", "datasets", "lightning", "random", "struct", "pickle")
"""Names of modules that others import, and that a user's directory may hold for other reasons."""


def blocks(language: str, documents: Sequence[str]) -> list[str]:
    """The documents' code in one language."""
    text = "\n".join((ROOT / name).read_text() for name in documents)
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def settle(directory: Path, checkpoint: Path) -> None:
    """Write what the README has its reader write, with a tiny model for its one."""
    python, script = blocks("python", ["README.md"])
    [yaml] = [block for block in blocks("yaml", ["README.md"]) if "my_run.yaml" in block]
    local = str(checkpoint)
    (directory / "my_task.py").write_text(python)
    (directory / "my_run.yaml").write_text(yaml.replace("Qwen/Qwen3-0.6B", local))
    (directory / "my_script.py").write_text(script.replace("Qwen/Qwen3-0.6B", local))
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(64)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "train.jsonl").write_text(lines)
    (directory / "configs").symlink_to(ROOT / "configs")


def lay_traps(directory: Path) -> None:
    """Modules that nothing may import for those of the same name."""
    for name in SHADOWS:
        (directory / f"{name}.py").write_text(f"raise ImportError('the trap {name}.py')\n")


def environment(**others: str) -> dict[str, str]:
    """Without what would help a program to find modules."""
    inherited = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return {**inherited, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **others}


def run(
    command: str, directory: Path, *options: str, **others: str
) -> subprocess.CompletedProcess[str]:
    """A command of the documents, in a directory, with more options after its own."""
    name, *words = shlex.split(command, comments=True)
    assert name == "copris"
    return subprocess.run(
        [str(SCRIPT), *words, *options],
        cwd=directory,
        env=environment(**others),
        capture_output=True,
        text=True,
        check=False,
    )
