"""Starts two processes that run scenarios together, and brings back what each gave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).parent


def run(
    script: str,
    checkpoint: Path,
    directory: Path,
    scenarios: Iterable[str],
    *,
    deadline_s: float = 600,
    **environment: Any,
) -> dict[str, list[Any]]:
    """Each scenario's results, a list over the two ranks; shorter where a rank did not get there.

    Args:
        script: a file of ``tests/support``, run as ``script CHECKPOINT DIRECTORY SCENARIO...``.
        environment: variables besides torchrun's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = list(scenarios)
    processes = []
    for rank in range(2):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "GROUP_RANK": 0,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": 1,
            "PYTHONPATH": SUPPORT,
            **environment,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, SUPPORT / script, checkpoint, directory, *names],
                env={**os.environ, **{k: str(v) for k, v in variables.items()}},
                stdout=(directory / f"log.{rank}.txt").open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    try:
        for process in processes:
            process.wait(deadline_s)
    except subprocess.TimeoutExpired:
        warnings.warn("the ranks hung", stacklevel=1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {
        name: [
            torch.load(file, weights_only=False) for file in sorted(directory.glob(f"{name}.?.pt"))
        ]
        for name in names
    }


def outcomes(results: dict[str, Any], scenario: str) -> list[Any]:
    """Both ranks' results; fails with the traceback if there is one instead."""
    both: list[Any] = results[scenario]
    assert len(both) == 2, "the ranks did not get there"
    for rank, result in enumerate(both):
        assert not (isinstance(result, str) and "Traceback" in result), f"rank {rank}: {result}"
    return both
