"""The quickstart's command on two ranks and the real engine, under the strategies a CPU can run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from copris_lightning import Sampling
from copris_lightning.core.saved import SavedGroups
from copris_lightning.datamodules.divide import BatchShape, divide
from copris_lightning.policy.module import CoprisModule

ROOT = Path(__file__).parents[1]


ON_TWO_RANKS = {
    "ddp": ROOT / "configs/overlays/ddp.yaml",
    "fsdp2": ROOT / "configs/overlays/fsdp2.yaml",
    "deepspeed_stage_3": ROOT / "tests/support/deepspeed_on_cpu.yaml",
}


def fit(checkpoint: Path, directory: Path, strategy: str) -> str:
    """Three batches; returns what the command printed."""
    overlay = directory / "overlay.yaml"
    engine = {
        "class_path": "copris_testing.RecordingEngine",
        "init_args": {
            "engine_args": {
                "dtype": "float32",
                "enforce_eager": True,
                "kv_cache_memory_bytes": 2**27,
            },
            "environment": {"COPRIS_TEST_RECORD": str(directory / "received.jsonl")},
        },
    }
    data = {
        "task": {
            "scoring": {"reward": {"class_path": "some_rewards.ShareOfDigits"}},
            "sampling": {"max_new_tokens": 64},
        },
        "flow": {"cap": 16},
        "batch": {"groups": 4, "group_size": 2},
        "engine": engine,
    }
    overlay.write_text(
        yaml.safe_dump(
            {
                "model": {"init_args": {"model": str(checkpoint)}},
                "data": {"init_args": data},
                "trainer": {"max_steps": 3, "accumulate_grad_batches": 2},
            }
        )
    )
    command = [sys.executable, "-m", "copris_lightning", "fit"]
    for config in (ROOT / "configs/quickstart.yaml", ON_TWO_RANKS[strategy], overlay):
        command += ["--config", str(config)]
    command += [
        "--trainer.callbacks+=copris_testing.SaveBatches",
        f"--trainer.callbacks.directory={directory}",
    ]
    environment = {
        "PYTHONPATH": str(ROOT / "tests" / "support"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        command,
        cwd=directory,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def loss_alone(checkpoint: Path, saved: dict[str, Any]) -> float:
    """The loss of a saved batch, as one micro-batch on one rank."""
    module = CoprisModule(str(checkpoint))
    module.configure_model()
    assert module.policy is not None
    module.policy.model.load_state_dict(saved["before"])
    groups = SavedGroups.from_state(saved["groups"]).groups()
    [[batch]] = divide(
        groups,
        BatchShape(1, 1, 1, 64),
        source="trainer",
        policy_version=saved["policy_version"],
        sampling=Sampling(max_new_tokens=64),
        metrics={},
        seed=0,
    )
    loss, _ = module.policy_loss(batch, module.token_terms(batch))
    return float(loss.detach())


@pytest.mark.engines
@pytest.mark.parametrize("strategy", ON_TWO_RANKS)
def test_two_ranks_run_the_quickstart(strategy: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    printed = fit(tiny_checkpoint, tmp_path, strategy)
    summary = printed.rpartition("batches trained")[2]
    assert float(summary.split("worst parity")[1].split()[0]) < 1e-4
    # The other rank prints nothing of it again.
    assert printed.count("batches trained") == 1
    saved = [torch.load(tmp_path / f"batch_{i}.pt", weights_only=False) for i in range(3)]
    received = [json.loads(line) for line in (tmp_path / "received.jsonl").read_text().splitlines()]
    assert len(received) == 1 + 3
    for batch, weights in zip(saved, received[1:], strict=True):
        expected = {n: value for n, value in batch["after"].items() if n != "lm_head.weight"}
        assert weights == expected
        assert loss_alone(tiny_checkpoint, batch) == pytest.approx(batch["loss"], abs=1e-5)
    assert received[1] != received[0]
    ledger = sorted((tmp_path / "runs/quickstart/version_0/ledger").glob("*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in ledger] == [8, 8, 8]
