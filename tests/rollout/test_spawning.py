"""Where rewards are defined: what a worker process can import, and what is said where it cannot."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from served import is_alive
from some_rewards import Unloadable, parity

from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

REWARD = """
class Exact:
    def __call__(self, response, prompt):
        return float(response == prompt.answer)

    def method(self, response, prompt):
        return 2.0

def exact(response, prompt, bonus=0.0):
    return float(response == prompt.answer) + bonus
"""
RUN = """
import asyncio, functools
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

def run(reward):
    try:
        scorer = RewardScorer(Scoring(reward))
    except ConfigurationError as error:
        print("refused:", error)
        return
    try:
        print("scored:", asyncio.run(scorer("7", Prompt("p", text="", answer="7"))))
    except ConfigurationError as error:
        print("could not start:", error)
    finally:
        scorer.close()
"""
NOTEBOOK = """
import sys, types
notebook = types.ModuleType("__main__")  # as IPython and ipykernel do: no file, no spec
sys.modules["__main__"] = notebook
"""
ADVICE = "put it into a file of its own, such as my_task.py, and write `from my_task import"


def python(tmp_path: Path, *args: str, piped: str | None = None) -> str:
    """What a Python process prints; it is started in a directory with a module `my_task`."""
    (tmp_path / "my_task.py").write_text(REWARD)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *args],
        input=piped,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{root}:{tmp_path}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


REWARDS = ["Exact()", "Exact().method", "exact", "functools.partial(exact, bonus=1.0)", "[Exact()]"]


@pytest.mark.parametrize("how", ["-c", "piped", "notebook", "package"])
def test_a_reward_that_no_file_defines_is_refused_at_once_with_advice(tmp_path, how):
    script = REWARD + RUN + "".join(f"run({reward})\n" for reward in REWARDS[:-1])
    if how == "-c":
        output = python(tmp_path, "-c", script)
    elif how == "piped":
        output = python(tmp_path, "-", piped=script)
    elif how == "notebook":
        cell = f"exec({script!r}, notebook.__dict__)"
        output = python(tmp_path, "-c", NOTEBOOK + cell)
    else:
        (tmp_path / "task").mkdir()
        (tmp_path / "task" / "__main__.py").write_text(script)
        output = python(tmp_path, "-m", "task")
    lines = output.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ["Exact", "Exact", "exact", "exact"], strict=True):
        assert line.startswith(f"refused: reward: {name} is defined in a notebook")
        assert f"{ADVICE} {name}`" in line


@pytest.mark.parametrize("how", ["-c", "piped", "notebook", "without a guard"])
def test_a_reward_of_a_module_works_wherever_the_run_is_started(tmp_path, how):
    script = RUN + "from my_task import Exact, exact\n" + "run(Exact())\n"
    if how == "-c":
        output = python(tmp_path, "-c", script)
    elif how == "piped":
        output = python(tmp_path, "-", piped=script)
    elif how == "notebook":
        output = python(tmp_path, "-c", NOTEBOOK + f"exec({script!r}, notebook.__dict__)")
    else:
        (tmp_path / "script.py").write_text(script)
        output = python(tmp_path, "script.py")
    assert output.splitlines() == ["scored: 1.0"]


@pytest.mark.parametrize("how", ["script", "module"])
def test_a_reward_of_a_script_with_a_guard_works(tmp_path, how):
    guarded = "if __name__ == '__main__':\n    run(Exact())\n"
    (tmp_path / "script.py").write_text(REWARD + RUN + guarded)
    args = ["script.py"] if how == "script" else ["-m", "script"]
    assert python(tmp_path, *args).splitlines() == ["scored: 1.0"]


def test_a_script_without_a_guard_is_told_so(tmp_path):
    session = "from copris_lightning.rollout.spawning import refuse_second_run\n"
    script = REWARD + RUN + session + "refuse_second_run()\nrun(Exact())\n"
    (tmp_path / "script.py").write_text(script)
    (line,) = python(tmp_path, "script.py").splitlines()
    assert line.startswith("could not start: task.scoring.reward: a worker process cannot load")
    assert "script.py starts the run when it is imported" in line
    assert 'if __name__ == "__main__":' in line


# -- what fails in the worker --------------------------------------------------------------


def start(reward: object, start_s: float = 60.0) -> float:
    scorer = RewardScorer(Scoring(reward))
    scorer.start_s = start_s
    began = time.monotonic()
    try:
        asyncio.run(scorer.start())
    finally:
        scorer.close()
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("ImportError('no module named judge')", r"cannot load Unloadable: raised ImportErr"),
        ("SystemExit('not here')", r"cannot load Unloadable: raised SystemExit\('not here'\)"),
        ("exit", r"a worker process ended \(exit code 9\) while it loaded Unloadable"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_a_setting_that_cannot_work(what, says):
    with pytest.raises(ConfigurationError, match=rf"^task.scoring.reward: .*{says}") as error:
        start(Unloadable(what))
    assert (error.value.__cause__ is None) == (what == "exit")


def test_a_reward_that_hangs_while_it_is_loaded_has_a_deadline():
    began = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"not ready after 1 s.*module of Unloadable"):
        start(Unloadable("hang"), start_s=1.0)
    assert time.monotonic() - began < 20


def test_a_module_that_only_this_process_knows_is_named(tmp_path):
    module = type(sys)("nowhere_to_be_found")
    exec(REWARD, module.__dict__)
    sys.modules["nowhere_to_be_found"] = module
    try:
        with pytest.raises(ConfigurationError, match=r"No module named 'nowhere_to_be_found'"):
            start(module.Exact())
    finally:
        del sys.modules["nowhere_to_be_found"]


def test_after_a_fault_every_call_says_so():
    scorer = RewardScorer(Scoring(Unloadable("ImportError('gone')")))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="gone"):
            asyncio.run(scorer("x", Prompt("p", text="")))
    scorer.close()


def test_starting_twice_is_no_harm():
    scorer = RewardScorer(Scoring(parity, workers=2))
    for _ in range(2):
        asyncio.run(scorer.start())
    scorer.close()


# -- whole runs ----------------------------------------------------------------------------

FIT = """
import lightning as L
from builders import small_data
from copris_testing import SomePrompts
from copris_lightning import CoprisModule, SimulatedEngine, WeightSync
import sys

class Engine(SimulatedEngine):
    async def start(self, spec):
        print("the engine boots", flush=True)
        await super().start(spec)

def main():
    data = small_data(
        sys.argv[1], Engine(), prompts=SomePrompts(8), reward=Reward(), cap=4, groups=2,
        max_new_tokens=8,
    )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[WeightSync()],
    )
    trainer.fit(CoprisModule(sys.argv[1]), datamodule=data)
    print("fitted", flush=True)
"""


def fit(tmp_path: Path, checkpoint: Path, script: str) -> tuple[str, str]:
    """Output and errors of a script that trains."""
    root = Path(__file__).parents[2]
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py", str(checkpoint)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    return done.stdout, done.stderr


def test_a_script_whose_reward_needs_a_guard_is_told_before_the_engine_boots(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    reward = REWARD.replace("Exact", "Reward")
    output, errors = fit(tmp_path, tiny_checkpoint, reward + FIT + "main()\n")
    assert "the engine boots" not in output
    last = errors.strip().splitlines()[-1]
    assert "ConfigurationError: task.scoring.reward: a worker process cannot load Reward" in last
    assert "script.py starts the run when it is imported" in last


def test_a_busy_worker_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        RUN.replace('scorer("7"', 'scorer("hang"')
        + "from some_rewards import DoesWhatItIsTold\nrun(DoesWhatItIsTold())\n"
    )
    root = Path(__file__).parents[2]
    trainer = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'tests' / 'support'}"},
    )
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not workers:
        assert time.monotonic() < deadline
        workers = psutil.Process(trainer.pid).children()
        time.sleep(0.05)
    time.sleep(1.0)  # it is at work
    assert is_alive(workers[0])
    trainer.kill()
    trainer.wait()
    while is_alive(workers[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
