"""Fixtures shared by all tests: tiny checkpoints, and one vLLM engine for the whole session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports vLLM or a Hugging Face library: no hub, and logs that can be read.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# What these assert tells as much as in a test file.
pytest.register_assert_rewrite("estimates", "rollouts")

pytest_plugins = ["pytester", "slices"]

CPU_ENGINE_ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**27,
}


LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
"""What says that a process was started as one of several, with MASTER_ADDR and MASTER_PORT."""


@pytest.fixture(autouse=True)
def no_ranks_in_the_environment() -> Iterator[None]:
    """Lightning's strategies leave theirs behind, and a run that a later test starts would take
    itself for one of those ranks and wait for the others."""
    yield
    for name in (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Qwen3 of 0.2 M parameters with tied embeddings."""
    from copris_lightning.quickstart.warm_start import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tied"), hidden_size=64, layers=2)


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    from copris_lightning.quickstart.warm_start import tiny_model

    return tiny_model(tmp_path_factory.mktemp("untied"), hidden_size=64, layers=2, tied=False)


@pytest.fixture
def cpu_engine_args() -> dict[str, object]:
    """Engine arguments for vLLM's CPU build."""
    return dict(CPU_ENGINE_ARGS)


@pytest.fixture(scope="session")
def running_vllm(tiny_checkpoint: Path) -> Iterator[object]:
    """``(engine, call)``: a booted engine, held, and a function that runs coroutines on its loop.

    It holds back tokens as engines in earnest do.
    """
    from copris_lightning.engines.engine import EngineSpec
    from copris_lightning.engines.vllm import VLLMEngine
    from copris_lightning.rollout.loop_thread import LoopThread

    engine = VLLMEngine({**CPU_ENGINE_ARGS, "stream_interval": 8})
    loop = LoopThread(engine.new_event_loop)
    try:
        loop.call(engine.start(EngineSpec(str(tiny_checkpoint), 16, 257, vocab_size=98)))
        yield engine, loop.call
    finally:
        loop.call(engine.close())
        loop.close()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop on virtual time, on which no task may be left."""
    from copris_lightning.engines.virtual_time import VirtualClockLoop

    made = VirtualClockLoop()
    yield made
    leftovers = asyncio.all_tasks(made)
    made.close()
    assert not leftovers
