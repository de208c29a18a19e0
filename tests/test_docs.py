"""What the documents show is run, or at least parsed, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from newcomer import SIMULATED, SMALL, blocks, environment, settle

from copris_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
DOCS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")))


def shell_commands() -> list[str]:
    lines = [line.split("#")[0].strip() for b in blocks("bash", DOCS) for line in b.splitlines()]
    return sorted({line for line in lines if line})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """The README's reader's directory. Nothing but the command itself puts it on the path."""
    settle(tmp_path, tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path


FIT = [*SMALL, SIMULATED, "--trainer.max_steps=2"]
OTHERS = ("serve", "simulate")
"""What is no run: see below, and `tests/test_docs_simulate.py`."""

RUNS = [c for c in shell_commands() if c.startswith("copris ") and c.split()[1] not in OTHERS]
SERVERS = [c for c in shell_commands() if c.startswith("copris serve ")]


@pytest.mark.parametrize("command", RUNS)
def test_commands_of_the_documents_are_understood(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(command)[1:], "--print_config"])
    assert stop.value.code == 0
    assert "RolloutDataModule" in capsys.readouterr().out


@pytest.mark.parametrize("command", SERVERS)
def test_servers_of_the_documents_are_started_with_options_that_vllm_knows(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    started: list[str] = []
    monkeypatch.setattr(os, "execve", lambda program, args, environment: started.extend(args))
    main(shlex.split(command)[1:])
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(started[3:])
    assert parsed.port == 8000


def test_the_checkpoint_that_the_page_on_lora_saves_is_the_merged_model(
    home: Path, tiny_checkpoint: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from copris_lightning import CoprisModule, LoRA

    [block] = blocks("python", ["docs/lora.md"])
    trained = CoprisModule(str(tiny_checkpoint), lora=LoRA(rank=16))
    trained.configure_model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    torch.save({"state_dict": trained.state_dict()}, home / "last.ckpt")
    names = {"torch": torch, "CoprisModule": CoprisModule, "LoRA": LoRA}
    local = block.replace("Qwen/Qwen3-0.6B", str(tiny_checkpoint))
    exec(local, {**names, "AutoModelForCausalLM": AutoModelForCausalLM})
    saved = AutoModelForCausalLM.from_pretrained(home / "trained", dtype="float32")
    for name, tensor in trained.named_weights():
        assert torch.equal(saved.get_parameter(name), tensor)


OVERLAYS = [block for block in blocks("yaml", DOCS) if "my_run.yaml" not in block]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=range(len(OVERLAYS)))
def test_parts_of_a_config_in_the_documents_train(
    overlay: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "overlay.yaml").write_text(overlay)
    assert main(["fit", "--config", "my_run.yaml", "--config", "overlay.yaml", *FIT]) == 0
    assert "2 batches trained" in capsys.readouterr().out


def test_figures_and_files_that_the_documents_name_exist() -> None:
    for name in DOCS:
        text = (ROOT / name).read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / name).parent / link).exists(), (name, link)
        for path in re.findall(r"`((?:configs|tests|benchmarks|docs)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), (name, path)


def test_the_readmes_script_trains(home: Path) -> None:
    script = (home / "my_script.py").read_text()
    engine = 'VLLMEngine({"dtype": "float32", "enforce_eager": True})'
    assert engine in script
    script = script.replace(engine, "SimulatedEngine()").replace("VLLMEngine", "SimulatedEngine")
    script = script.replace("max_steps=200", 'max_steps=2, accelerator="cpu"')
    (home / "my_script.py").write_text(script)
    result = subprocess.run(
        [sys.executable, "my_script.py"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_make_targets_and_test_paths_of_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in shell_commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), command
        elif "pytest" in words:
            for path in (w for w in words if w.startswith("tests/")):
                assert (ROOT / path).exists(), command
        else:
            assert words[0] in ("copris", "pip"), f"nothing runs this command: {command}"


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
