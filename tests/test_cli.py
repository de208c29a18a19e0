"""The command line: every config, every bad input, and whole runs on the simulated engine."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy

from copris_lightning import Sampling
from copris_lightning.__main__ import main
from copris_lightning.cli import CoprisCLI
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.server import VLLMServerEngine
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.policy.module import CoprisModule

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "overlays").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SIMULATED = str(ROOT / "configs" / "simulated.yaml")
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def never_boots(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(self: VLLMEngine, spec: EngineSpec) -> None:
        pytest.fail("the engine was booted")

    monkeypatch.setattr(VLLMEngine, "start", start)


def instantiate(*args: str) -> CoprisCLI:
    return CoprisCLI(
        CoprisModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
        args=list(args),
    )


def data_files(directory: Path) -> list[str]:
    """Local stand-ins for the data sets that the large config names."""
    rows = [{"problem": f"What is {i}?", "answer": str(i)} for i in range(80)]
    (directory / "data").mkdir()
    for name in ("deepscaler", "aime24"):
        path = directory / "data" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--trainer.accelerator", "cpu"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_instantiated(config: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--model.init_args.model", str(tiny_checkpoint)]
    if config.stem.startswith("deepscaler"):
        args += data_files(tmp_path)
    cli = instantiate(*args)
    assert cli.datamodule.model == str(tiny_checkpoint)
    assert cli.model.model == str(tiny_checkpoint)


def test_the_large_config_is_the_papers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "deepscaler_1.5b.yaml")
    model = ["--model.init_args.model", str(tiny_checkpoint)]
    cli = instantiate("--config", config, *model, *data_files(tmp_path))
    settings = cli.datamodule.settings
    assert (settings.flow.cap, settings.batch.groups, settings.batch.group_size) == (1024, 64, 8)
    assert settings.task.max_prompt_tokens == 1024
    assert settings.task.sampling == Sampling(1.0, 15360)
    assert settings.evaluations["aime24"].samples == 32
    assert settings.sampling("aime24") == Sampling(0.6, 15360)
    assert (cli.model.estimator.loss.clip_low, cli.model.estimator.loss.clip_high) == (0.2, 0.28)
    assert cli.model.estimator.loss.dual_clip == 10.0
    assert cli.trainer.gradient_clip_val == 1.0
    cli.model.configure_model()
    configured = cli.model.configure_optimizers()
    schedule = configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(12):
        rates.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        schedule.step()
    assert rates[0] < rates[5] < rates[10] == pytest.approx(1e-6)
    assert rates[11] == pytest.approx(1e-6)
    assert configured["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_instantiated_and_its_launch_lines_fit_it(
    recipe: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    head = re.sub(r"\\\n#\s+", "", recipe.read_text())
    lines = re.findall(r"^#   (.*\bfit .*)$", head, re.M)
    assert lines
    for line in lines:
        names = re.findall(r"--config (\S+)", line)
        assert names == ["configs/deepscaler_1.5b.yaml", f"configs/recipes/{recipe.name}"]
    args = [part for name in names for part in ("--config", str(ROOT / name))]
    model = ["--model.init_args.model", str(tiny_checkpoint)]
    cli = instantiate(*args, *model, *data_files(tmp_path))
    trainer, data = cli.trainer, cli.datamodule
    ranks = trainer.world_size
    if isinstance(trainer.strategy, ModelParallelStrategy):
        assert trainer.strategy._data_parallel_size == ranks
    for line in lines:
        sizes = dict(re.findall(r"--(nnodes|nproc-per-node|nodes|ntasks-per-node) (\d+)", line))
        if sizes:
            counts = [int(size) for size in sizes.values()]
            assert math.prod(counts) == ranks, line
    # Batches divide evenly, and validation comes after whole ones.
    assert data.settings.batch.groups * data.settings.batch.group_size % ranks == 0
    per_batch = cli.config.trainer.accumulate_grad_batches
    assert cli.config.trainer.val_check_interval == 20 * per_batch
    engine = data.engine
    if isinstance(engine, VLLMServerEngine):
        lengths = re.findall(r"--max-model-len (\d+)", head)
        assert lengths == [str(data.settings.max_sequence_tokens + 1)]
        served = re.findall(r"serve --model (\S+)", head)
        named = yaml.safe_load(recipe.read_text()).get("model", {}).get("init_args", {})
        base = yaml.safe_load((ROOT / names[0]).read_text())["model"]["init_args"]
        assert served == [named.get("model", base["model"])]
        seats = re.findall(r"--max-num-seqs (\d+)", head)
        assert int(seats[0]) * len(engine.urls) >= data.settings.flow.cap
    else:
        assert set(engine.engine_args) <= {field.name for field in fields(AsyncEngineArgs)}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.stem)
def test_every_overlay_changes_what_it_says_and_nothing_else(
    overlay: Path, tiny_checkpoint: Path
) -> None:
    base = ["--config", QUICKSTART, "--model.init_args.model", str(tiny_checkpoint)]
    plain = instantiate(*base).config.as_dict()
    changed = instantiate("--config", QUICKSTART, "--config", str(overlay), *base[2:])
    changed = changed.config.as_dict()
    differences = {
        "auto_cap": [("data", "init_args", "flow", "cap", {"least": 16, "most": 256})],
        "sync": [("data", "init_args", "flow", "max_staleness", 0)],
        "kept": [("data", "init_args", "flow", "kv", "kept")],
        "streaming": [
            ("data", "init_args", "flow", "mode", "streaming"),
            ("data", "init_args", "flow", "max_staleness", 2),
        ],
        "no_is": [
            (
                *("model", "init_args", "estimator", "ratio"),
                {"class_path": "copris_lightning.UncorrectedRatio"},
            )
        ],
        "ddp": [("trainer", "devices", 2), ("trainer", "strategy", "ddp")],
        "fsdp2": [
            ("trainer", "devices", 2),
            (
                "trainer",
                "strategy",
                {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
            ),
        ],
        "servers": [
            (
                "data",
                "init_args",
                "engine",
                {"class_path": "copris_lightning.VLLMServerEngine"},
            )
        ],
        "lora": [("model", "init_args", "lora", {"rank": 16, "sync": "merge"})],
        "best": [
            ("trainer", "enable_checkpointing", True),
            ("trainer", "limit_val_batches", 1.0),
            ("trainer", "val_check_interval", 10),
            ("trainer", "check_val_every_n_epoch", None),
        ],
    }[overlay.stem]
    if overlay.stem == "best":  # one more callback
        assert (
            changed["trainer"]["callbacks"].pop()["init_args"]["monitor"] == "val/division/avg_at_k"
        )
    for *path, key, value in differences:
        for config in (plain, changed):
            for name in path:
                config = config[name]
            seen = config.pop(key)
        if isinstance(value, dict):  # of an object, what the overlay is about
            seen = {name: seen[name] for name in value}
        assert seen == value
    plain.pop("config")
    changed.pop("config")
    assert changed == plain


def test_the_copris_preset_is_the_default(tiny_checkpoint: Path) -> None:
    preset = str(ROOT / "configs" / "presets" / "copris.yaml")
    base = ["--config", SIMULATED]
    base += ["--model.init_args.model", str(tiny_checkpoint)]
    plain, named = instantiate(*base), instantiate(*base[:2], "--config", preset, *base[2:])
    assert plain.model.estimator == named.model.estimator
    for part in ("flow", "batch", "credit"):
        both = (getattr(cli.datamodule.settings, part) for cli in (plain, named))
        assert len(set(both)) == 1


@pytest.mark.parametrize("config", [SIMULATED, QUICKSTART], ids=["simulated", "quickstart"])
def test_print_config_round_trips(
    config: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", config, "--model.init_args.model", str(tiny_checkpoint)]
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
        (tmp_path / "printed.yaml").write_text(printed[-1])
        args = ["fit", "--config", str(tmp_path / "printed.yaml")]
    assert yaml.safe_load(printed[0]) == yaml.safe_load(printed[1])


def test_a_simulated_run_ends_with_a_summary_logs_and_a_ledger(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--config", SIMULATED, "--model.init_args.model", str(tiny_checkpoint)]
    assert main([*args, "--trainer.max_steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 batches trained" in out
    assert "carried over" in out
    assert len(list(tmp_path.glob("runs/simulated/version_0/ledger/batch_*.jsonl"))) == 4
    assert list(tmp_path.glob("runs/simulated/version_0/events.out.tfevents.*"))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_commands_run(
    command: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {"class_path": "copris_testing.SomePrompts", "init_args": {"size": 20}}
    some = {"some": {"prompts": prompts, "on": command, "samples": 3}}
    args = [command, "--config", SIMULATED, "--model.init_args.model", str(tiny_checkpoint)]
    assert main([*args, f"--data.init_args.evaluations={json.dumps(some)}"]) == 0
    if command == "predict":
        lines = next(tmp_path.rglob("predictions.jsonl")).read_text().splitlines()
        records = [json.loads(line) for line in lines]
        counts = {f"p{i:03d}": 3 for i in range(20)}
        assert {n: sum(r["prompt_id"] == n for r in records) for n in counts} == counts
    else:
        area = {"validate": "val", "test": "test"}[command]
        assert f"{area}/some/pass_at_k" in capsys.readouterr().out


BAD_INPUT = [
    (["--data.init_args.flow.cap", "0"], r"data.init_args.flow.cap=0 must be at least 1"),
    (["--data.init_args.batch.groups", "0"], r"data.init_args.batch.groups=0"),
    (["--group_size", "1"], r"data.init_args.batch.group_size=1 must be at least 2"),
    (
        ["--temperature", "0"],
        r"data.init_args.task.sampling.temperature=0.0 must be above 0",
    ),
    (
        ["--max_new_tokens", "512"],
        r"data.init_args.task.sampling.max_new_tokens=512 does not fit .* 512 tokens",
    ),
    (["--max_new_tokens=500"], r"32 \+ data.*\.max_new_tokens=500 = 532 exceeds"),
    (["--model.init_args.model", "no/such-model"], r"model.init_args.model='no/such-model'"),
    (["--model.init_args.model", "/no/such/dir"], r"model.init_args.model='/no/such/dir'"),
    (
        ["--data.init_args.task.prompts", "bad_prompts.Chat"],
        r"chat messages, but the tokenizer .* has no chat template",
    ),
    (
        ["--data.init_args.task.prompts", "bad_prompts.Empty"],
        r"data.init_args.task.prompts.* is empty",
    ),
    (
        ["--data.init_args.task.prompts", "bad_prompts.Long"],
        r"prompt 'long' has 40 tokens, more than data.init_args.task.max_prompt_tokens=32",
    ),
    (
        ["--reward", "bad_prompts.NotAReward"],
        r"init_args.task.scoring.reward: .*bad_prompts.NotAReward' to be a class that .* callable",
    ),
    (
        ["--trainer.accumulate_grad_batches", "100"],
        r"64 trajectories cannot fill 100 micro-batches .*accumulate_grad_batches=100",
    ),
    (
        ["--trainer.callbacks", "copris_lightning.StalenessMonitor"],
        r"trainer.callbacks has no copris_lightning.WeightSync",
    ),
    (
        ["--data.init_args.engine.init_args.engine_args", '{"max_num_seqs": 3}'],
        r"init_args.engine_args.max_num_seqs=3 is below the 64 that data.init_args.flow.cap",
    ),
]

BAD_PROMPTS = """
from copris_lightning import Prompt

class Chat:
    def __len__(self): return 1
    def __getitem__(self, i): return Prompt("chat", messages=({"role": "user", "content": "1+1"},))

class Empty:
    def __len__(self): return 0
    def __getitem__(self, i): raise IndexError

class Long:
    def __len__(self): return 1
    def __getitem__(self, i): return Prompt("long", text="1" * 40)

class NotAReward:
    pass
"""


@pytest.mark.usefixtures("never_boots")
@pytest.mark.parametrize(("change", "message"), BAD_INPUT, ids=lambda v: str(v)[:60])
def test_bad_input_is_refused_before_the_engine_boots(
    change: list[str],
    message: str,
    no_chat_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad_prompts.py").write_text(BAD_PROMPTS)
    monkeypatch.syspath_prepend(tmp_path)
    args = ["fit", "--config", QUICKSTART, "--model.init_args.model", str(no_chat_checkpoint)]
    try:
        status: Any = main([*args, *change])
    except SystemExit as stop:  # what the argument parser itself refuses
        status = stop.code
    assert status == 2
    complaint = capsys.readouterr().err
    assert re.search(message, complaint, re.S), complaint[-2000:]
    assert "Traceback" not in complaint


@pytest.fixture(scope="module")
def no_chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from copris_lightning.quickstart.warm_start import tiny_model

    path = tiny_model(tmp_path_factory.mktemp("plain"), hidden_size=64, layers=2)
    for file in path.glob("chat_template*"):
        file.unlink()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


def test_the_package_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "copris_lightning", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0
    for command in ("fit", "validate", "test", "predict"):
        assert command in result.stdout
