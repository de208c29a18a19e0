"""The overlay that keeps the best checkpoint keeps it, and its name makes no directories."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from copris_lightning.__main__ import main

ROOT = Path(__file__).parents[2]


def test_the_best_checkpoint_is_kept_under_a_name_without_a_slash(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [ROOT / "configs" / "simulated.yaml", ROOT / "configs" / "overlays" / "best.yaml"]
    args = [f"--config={path}" for path in configs]
    args += [f"--model.init_args.model={tiny_checkpoint}", "--trainer.max_steps=4"]
    args += ["--trainer.val_check_interval=2", "--reward=some_rewards.Parity"]
    prompts = "copris_lightning.quickstart.task.DivisionPrompts"
    division = {"prompts": {"class_path": prompts, "init_args": {"size": 8}}}
    args.append(f"--data.init_args.evaluations={json.dumps({'division': division})}")
    assert main(["fit", *args]) == 0
    saved = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.ckpt")]
    [best] = saved
    found = re.fullmatch(
        r"runs/simulated/version_0/checkpoints/best-step_00000([24])-avg_at_k_(0\.\d{3})\.ckpt",
        best,
    )
    assert found, saved
    shown = [
        float(x) for x in re.findall(r"val/division/avg_at_k=(0\.\d+)", capsys.readouterr().out)
    ]
    assert float(found[2]) == pytest.approx(max(shown), abs=6e-4)
