"""Two real servers for all who need some, and the model that they serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Served
from synced import sync
from transformers import AutoModelForCausalLM

from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.server import VLLMServerEngine
from copris_lightning.rollout.loop_thread import LoopThread


@pytest.fixture(scope="package")
def started_servers(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Served]]:
    """Two servers, which boot at once on the cores that there are."""
    logs = tmp_path_factory.mktemp("servers")
    started = [Served(tiny_checkpoint, logs / f"{i}.log", core=i) for i in range(2)]
    try:
        yield started
    finally:
        for server in started:
            server.end()


@pytest.fixture
def servers(started_servers: list[Served]) -> list[Served]:
    """They answer: one that a test has ended is started again, so whoever ends them comes last."""
    for server in started_servers:
        server.start()
    for server in started_servers:
        server.wait_until_ready()
    return started_servers


@pytest.fixture
def model(tiny_checkpoint: Path) -> Any:
    """The checkpoint in transformers; an engine may hold other weights until it is synced."""
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


Connected = tuple[VLLMServerEngine, Callable[..., Any]]


@pytest.fixture
def connect(servers: list[Served], tiny_checkpoint: Path) -> Iterator[Callable[..., Connected]]:
    """Makes engines on both servers, with a function that runs coroutines on their loop."""
    opened: list[tuple[VLLMServerEngine, LoopThread]] = []

    def make(**settings: Any) -> Connected:
        engine = VLLMServerEngine([server.url for server in servers], **settings)
        loop = LoopThread(engine.new_event_loop)
        opened.append((engine, loop))
        loop.call(engine.start(EngineSpec(str(tiny_checkpoint), 16, 257, vocab_size=98)))
        loop.call(engine.release(0))
        return engine, loop.call

    yield make
    for engine, loop in opened:
        loop.call(engine.close())
        loop.close()


@pytest.fixture
def connected(connect: Callable[..., Connected], model: Any) -> Connected:
    """An engine whose servers have the weights of ``model``."""
    engine, call = connect()
    sync(engine, call, model.named_parameters(), 1)
    return engine, call
