"""A config that cannot work ends in one line: the key, the value, and what it must be."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from copris_testing import SomePrompts
from some_rewards import parity

import copris_lightning
from copris_lightning import Scoring, Task
from copris_lightning.__main__ import main
from copris_lightning.core.estimator import corrections, losses, penalties, ratios
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.simulated import Faults, LengthModel, SimulatedEngine, StepTime
from copris_lightning.errors import ConfigurationError

ROOT = Path(__file__).parents[1]
DATA, MODEL = "--data.init_args", "--model.init_args"
SCHEDULE = f"{MODEL}.lr_scheduler=torch.optim.lr_scheduler.LinearLR"

VALUES = [
    # What the parser itself refuses, at any depth.
    (
        [f"{DATA}.flow.cap=abc"],
        "data.init_args.flow.cap=abc must be a whole number or auto or a mapping of least and most",
    ),
    (
        [f"{DATA}.engine.init_args.step_time.t0=abc"],
        "data.init_args.engine.init_args.step_time.t0=abc must be a number",
    ),
    ([f"{DATA}.nothing=3"], "data.init_args.nothing: there is no such setting"),
    (
        [f"{DATA}.engine.init_args.nope=3"],
        "data.init_args.engine.init_args.nope: there is no such setting",
    ),
    (
        [f"{DATA}.flow.max_staleness=abc"],
        "data.init_args.flow.max_staleness=abc must be a whole number or null",
    ),
    (
        [f"{DATA}.flow.behavior_logprobs=x"],
        "data.init_args.flow.behavior_logprobs=x must be auto or trainer or engine",
    ),
    (["--seed_everything=abc"], "seed_everything=abc must be true or false or a whole number"),
    (
        [f"{DATA}.task.scoring.reward=nope.Nope"],
        "data.init_args.task.scoring.reward: No module named 'nope'",
    ),
    (
        [f"{DATA}.engine.init_args.lengths={{median: 1, median: 2}}"],
        "median stands twice; leave one",
    ),
    # Null where it is no value, also within classes and where the parser has nulls of its own.
    (
        [f"{DATA}.flow.cap=null"],
        "data.init_args.flow.cap=null must be a whole number or auto or a mapping",
    ),
    (
        [f"{DATA}.credit.truncated=null"],
        "data.init_args.credit.truncated=null must be train or mask",
    ),
    (
        [f"{DATA}.engine.init_args.lengths.median=null"],
        "engine.init_args.lengths.median=null must be a number",
    ),
    (
        [f"{MODEL}.optimizer.init_args.lr=null"],
        "model.init_args.optimizer.init_args.lr must be a number",
    ),
    (
        ['--config={"data": {"init_args": {"flow": {"cap": null}}}}'],
        "init_args.flow.cap=null must be a whole",
    ),
    (
        ['--config={"trainer": {"max_steps": null}}'],
        "trainer.max_steps=null must be a whole number",
    ),
    (['--config={"trainer": null}'], "trainer=null must be a mapping"),
    (['--config={"trainer": {"max_step": 3}}'], "trainer.max_step: there is no such setting"),
    (["--trainer.accumulate_grad_batches=null"], "accumulate_grad_batches=null must be a whole"),
    (["--seed_everything=null"], "seed_everything=null must be true or false or a whole"),
    # Misspelt keys, and class paths that are none.
    ([f"{MODEL}.optimizer.init_args.nope=3"], "optimizer.init_args.nope: there is no such setting"),
    (
        [f"{DATA}.task.scoring.reward.init_args.nope=3"],
        "reward.init_args.nope: there is no such setting",
    ),
    (
        [f"{DATA}.task.sampling={{stops: [a]}}"],
        "data.init_args.task.sampling.stops: there is no such setting",
    ),
    ([f"{MODEL}.optimizer.class_path=3"], "optimizer.* must be the path of a class: module.Class"),
    (["--trainer.callbacks=[{class_path: Nope}]"], "class_path=Nope: it must be the path of a cl"),
    # What Lightning, torch or numpy would refuse with a traceback, or take in silence.
    ([f"{DATA}.seed=5"], "--data.init_args.seed has no effect: --seed_everything decides it"),
    (["--data.model=x"], "--data.model has no effect: --model.init_args.model decides it"),
    (["--seed_everything=-3"], r"seed_everything=-3 must be from 0 to 2\^32 - 1"),
    (["--trainer.strategy=ddpx"], "trainer: .*invalid strategy name: `strategy='ddpx'`"),
    ([f"{MODEL}.optimizer.init_args.lr=-1"], "optimizer: Invalid learning rate: -1"),
    ([f"{MODEL}.optimizer.init_args.lr=.inf"], "optimizer.init_args.lr=inf must be a finite"),
    ([f"{MODEL}.optimizer.init_args.betas=[0.9, 2]"], "optimizer: Invalid beta .* 2"),
    ([SCHEDULE, f"{MODEL}.lr_scheduler.init_args.start_factor=3"], "lr_scheduler: Starting mult"),
    (["--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches=0 must be at least 1"),
    (["--trainer.accumulate_grad_batches=-3"], "accumulate_grad_batches=-3 must be at least 1"),
    (["--trainer.max_steps=0"], "trainer.max_steps=0 trains nothing"),
    (["--trainer.val_check_interval=0"], "trainer.val_check_interval=0 must be above 0"),
    (["--trainer.val_check_interval=100000"], "val_check_interval=100000 exceeds the .* epoch"),
    (["--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch=0 must be at least 1"),
    (["--trainer.devices=x"], "trainer: `devices` .* should be an int"),
    (["--trainer.limit_train_batches=0"], "trainer.limit_train_batches=0 trains nothing"),
    (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val=-1.* must be a number above 0"),
    (["--trainer.gradient_clip_val=.nan"], "trainer.gradient_clip_val=nan must be a number above"),
    # Numbers that no machine holds.
    (
        [f"{DATA}.flow.cap=1000000000000"],
        "data.init_args.flow.cap=1000000000000: .* do not fit this machine",
    ),
    ([f"{DATA}.batch.groups=1000000000000"], "batch.groups=1000000000000 x .* do not fit"),
    (
        [f"{DATA}.evaluations={{a: {{prompts: copris_testing.SomePrompts, samples: {10**12}}}}}"],
        "data.init_args.evaluations.a.samples=1000000000000: .* do not fit",
    ),
    (
        [f"{DATA}.task.scoring.workers=1000000000000"],
        "init_args.task.scoring.workers=1000000000000 must be at most",
    ),
]


@pytest.fixture
def run(
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    async def start(self: SimulatedEngine, spec: EngineSpec) -> None:
        pytest.fail("the engine was booted")

    monkeypatch.setattr(SimulatedEngine, "start", start)
    monkeypatch.chdir(tmp_path)

    def run(*changes: str) -> str:
        config = str(ROOT / "configs" / "simulated.yaml")
        model = f"{MODEL}.model={tiny_checkpoint}"
        assert main(["fit", "--config", config, model, "--trainer.logger=false", *changes]) == 2
        [line] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("copris: ")]
        return line

    return run


@pytest.mark.parametrize(("change", "message"), VALUES, ids=lambda v: str(v)[:50])
def test_a_value_that_cannot_work_is_one_line(change: list[str], message: str, run: Any) -> None:
    line = run(*change)
    assert re.search(message, line), line


FILES = [
    ("", r"--config bad.yaml: the file holds no settings"),
    ("# only a remark\n", r"--config bad.yaml: the file holds no settings"),
    ("- a\n- b\n", r"--config bad.yaml: the file holds no settings"),
    ("a: [1,\n", r"--config bad.yaml: line 2: "),
    (
        "data:\n  init_args:\n    seed: 64\n    seed: 32\n",
        r"data.init_args.seed stands twice, in lines 3",
    ),
    ("trainer: {max_steps: 1}\ndata: {}\ntrainer: {}\n", r"trainer stands twice, in lines 1 and 3"),
    (
        "trainer:\n  callbacks:\n    - class_path: a.B\n      class_path: a.C\n",
        r"trainer.callbacks\[0\].class_path stands twice",
    ),
    ("data: {init_args: {seed: 5}}\n", "seed=5 has no effect: seed_everything decides it"),
    (
        "data: {init_args: {flow: {cap: abc}}}\n",
        r"data.init_args.flow.cap=abc must be a whole number or auto or a mapping of least",
    ),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=range(len(FILES)))
def test_a_file_that_cannot_be_read_is_one_line(content: str, message: str, run: Any) -> None:
    Path("bad.yaml").write_text(content)
    line = run("--config", "bad.yaml")
    assert re.search(message, line), line


def test_a_file_of_bytes_that_are_no_text_is_one_line(run: Any) -> None:
    Path("bad.yaml").write_bytes(b"trainer: \xff\xfe\n")
    assert "--config bad.yaml: " in run("--config=bad.yaml")


def float_settings() -> list[tuple[type, str]]:
    """Every setting that is a number with a fraction, of every class that YAML can name."""
    classes = [getattr(copris_lightning, name) for name in copris_lightning.__all__]
    classes += [LengthModel, StepTime, Faults]
    for module in (losses, corrections, penalties, ratios):
        classes += [c for _, c in inspect.getmembers(module, dataclasses.is_dataclass)]
    found = []
    for cls in dict.fromkeys(c for c in classes if isinstance(c, type)):
        for name, parameter in inspect.signature(cls).parameters.items():
            hint = typing.get_type_hints(cls.__init__).get(name, parameter.annotation)
            if float in (hint, *typing.get_args(hint)) and cls.__name__ != "Estimate":
                found.append((cls, name))
    return found


@pytest.mark.parametrize(("cls", "name"), float_settings(), ids=lambda v: getattr(v, "__name__", v))
def test_no_setting_takes_what_is_no_number(cls: type, name: str, tiny_checkpoint: Path) -> None:
    task = Task(SomePrompts(1), Scoring(parity))
    needed: dict[str, Any] = {
        "model": str(tiny_checkpoint),
        "prompts": SomePrompts(1),
        "reward": parity,
        "scoring": task.scoring,
        "task": task,
        "engine": SimulatedEngine(),
        "urls": ["http://127.0.0.1:8000"],
    }
    arguments = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.default is parameter.empty and parameter.name != name:
            arguments[parameter.name] = needed[parameter.name]

    def use() -> None:
        made: Any = cls(**arguments, **{name: math.nan})
        if hasattr(made, "validate"):  # engines look there
            made.validate(EngineSpec("x", 1, 1, vocab_size=9))

    with pytest.raises(ConfigurationError, match=f"{name}.*nan"):
        use()
