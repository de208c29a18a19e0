"""Where the command line's processes find modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from newcomer import environment, lay_traps

from copris_lightning import search_path
from copris_lightning.engines.vllm import VLLMEngine


def python(directory: Path, *arguments: str, **others: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment(**others),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


REWARD = """
import os, sys

def score(response, prompt):
    import queue, types, random
    there = [os.path.realpath(entry) == os.path.realpath(os.getcwd()) for entry in sys.path]
    assert there.index(True) == len(sys.path) - 1 and sys.path[0]
    # Programs that a reward starts run as anywhere else.
    assert "PYTHONSAFEPATH" not in os.environ
    return 0.5
"""

WORKERS = """
import asyncio, os
from copris_lightning.search_path import SAFE_PATH, SET_HERE, append_working_directory
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

async def main():
    scorer = RewardScorer(Scoring(my_task.score, workers=2))
    os.environ[SAFE_PATH] = SET_HERE  # as while the engine boots
    await scorer.start()
    print(await scorer("", Prompt("a", text="b")))
    scorer.close()

if __name__ == "__main__":
    append_working_directory()
    import my_task
    asyncio.run(main())
"""


def test_reward_workers_find_the_users_modules_and_nobody_else_does(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    (home / "my_task.py").write_text(REWARD)
    for name in ("queue", "types", "random", "struct", "pickle", "socket"):
        (home / f"{name}.py").write_text("raise ImportError('a trap')\n")
    (elsewhere / "run.py").write_text(WORKERS)
    assert python(home, str(elsewhere / "run.py")).strip() == "0.5"


@pytest.mark.parametrize("entry", ["", "absolute"])
def test_a_directory_that_is_there_is_not_added_again(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if entry else "", "/elsewhere"])
    before = list(sys.path)
    search_path._append()
    assert sys.path == before


def test_python_m_keeps_its_own_order(tmp_path: Path) -> None:
    code = "import sys\nfrom copris_lightning.search_path import append_working_directory\n"
    (tmp_path / "shows.py").write_text(f"{code}append_working_directory()\nprint(sys.path)\n")
    shown = eval(python(tmp_path, "-m", "shows"))
    assert shown[0] == str(tmp_path)
    assert shown.count(str(tmp_path)) == 1


def test_a_deleted_directory_is_no_reason_to_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    before = list(sys.path)
    search_path._append()
    assert sys.path == before


SERVER = "import copris_lightning.serve as serve; serve._VLLM = 'shows'; serve._become_server()"


@pytest.mark.parametrize(("own", "is_last"), [("copris", True), ("1", False)])
def test_a_server_finds_them_last(own: str, is_last: bool, tmp_path: Path) -> None:
    lay_traps(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shows.py").write_text("import sys, queue\nprint(sys.path)\n")
    given = {"PYTHONSAFEPATH": own, "PYTHONPATH": str(elsewhere)}
    shown = eval(python(tmp_path, "-c", SERVER, **given))
    assert (shown[-1] == str(tmp_path)) is is_last
    assert shown.count(str(tmp_path)) == int(is_last)


def test_the_engines_processes_do_not_look_there_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert VLLMEngine().environment["PYTHONSAFEPATH"]
    monkeypatch.setitem(os.environ, "PYTHONSAFEPATH", "mine")
    assert VLLMEngine().environment["PYTHONSAFEPATH"] == "mine"
    assert VLLMEngine(environment={"PYTHONSAFEPATH": None}).environment["PYTHONSAFEPATH"] is None
