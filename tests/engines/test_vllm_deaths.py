"""An engine that does not start, dies or hangs: the error names the reason that vLLM only logs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from served import cores
from synced import sync
from transformers import AutoModelForCausalLM

from copris_lightning.engines.engine import Decoding, EngineSpec, GenerationRequest
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.engines.watchdog import Deadlines
from copris_lightning.errors import EngineError, WeightSyncError
from copris_lightning.rollout.loop_thread import LoopThread

pytestmark = pytest.mark.kills

Booted = tuple[VLLMEngine, LoopThread]


class Boot:
    """Boots engines, and finds the processes of those: the session may have one of its own."""

    def __init__(self, checkpoint: Path, engine_args: dict[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._engine_args = engine_args
        self._others = set(cores(psutil.Process().children()))
        self._booted: list[Booted] = []

    def __call__(
        self,
        engine_class: type[VLLMEngine] = VLLMEngine,
        checkpoint: Path | None = None,
        deadlines: Deadlines = Deadlines(),  # noqa: B008 - frozen
        **arguments: Any,
    ) -> Booted:
        engine = engine_class({**self._engine_args, **arguments}, deadlines=deadlines)
        loop = LoopThread(engine.new_event_loop)
        self._booted.append((engine, loop))
        spec = EngineSpec(str(checkpoint or self._checkpoint), 16, 257, vocab_size=98)
        loop.call(engine.start(spec))
        loop.call(engine.release(0))
        return engine, loop

    def cores(self) -> list[psutil.Process]:
        return [core for core in cores(psutil.Process().children()) if core not in self._others]

    def workers(self) -> list[psutil.Process]:
        [core] = self.cores()
        return core.children()

    def close(self) -> None:
        for engine, loop in self._booted:
            loop.call(engine.close())
            loop.close()


@pytest.fixture
def boot(tiny_checkpoint: Path, cpu_engine_args: dict[str, Any]) -> Iterator[Boot]:
    """All that it booted is gone afterwards."""
    boot = Boot(tiny_checkpoint, cpu_engine_args)
    yield boot
    boot.close()
    assert not boot.cores()


async def generate_on(engine: VLLMEngine) -> None:
    async def one(i: int) -> None:
        request = GenerationRequest(f"r-{time.time()}-{i}", (5, 6, 7 + i), 200, Decoding(), i)
        async for _ in engine.stream(request):
            pass

    while True:
        await asyncio.gather(*(one(i) for i in range(8)))


def test_a_boot_without_memory_for_the_cache(boot: Boot) -> None:
    with pytest.raises(EngineError, match=r"did not start: EngineCore: ValueError: No available m"):
        boot(kv_cache_memory_bytes=4096)


def test_a_boot_from_weights_that_are_cut_off(
    boot: Boot, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(EngineError, match=r"did not start: Worker: SafetensorError: .*metadata"):
        boot(checkpoint=tmp_path / "cut")


def test_a_boot_that_hangs(boot: Boot) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"did not start within .*deadlines\.boot_s=3 s"):
        boot(deadlines=Deadlines(boot_s=3.0))
    assert time.monotonic() - began < 60


class FailingEngine(VLLMEngine):
    """Forward passes raise after the first sync."""

    worker_extension: ClassVar[str] = "failing_worker.FailingExtension"


def test_a_forward_pass_that_raises(boot: Boot, tiny_checkpoint: Path) -> None:
    engine, loop = boot(FailingEngine)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    sync(engine, loop.call, model.named_parameters())
    with pytest.raises(EngineError, match="Worker: ArithmeticError: a kernel has no answer"):
        loop.call(generate_on(engine))
    with pytest.raises(EngineError, match="the engine died: "):
        sync(engine, loop.call, model.named_parameters())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_core_that_is_told_to_stop_within_a_stage(boot: Boot, number: signal.Signals) -> None:
    engine, loop = boot()
    [victim] = boot.cores()
    threading.Timer(0.5, victim.send_signal, [number]).start()
    words = "was killed by SIGKILL" if number == signal.SIGKILL else "ended its requests by its"
    with pytest.raises(EngineError, match=f"the engine died: .*{words}"):
        loop.call(generate_on(engine))


def test_streams_of_a_dead_engine_end_where_vllm_does_not_end_them(
    boot: Boot,
) -> None:
    engine, loop = boot()
    [victim] = boot.cores()

    async def generate() -> None:
        streams = asyncio.create_task(generate_on(engine))
        await asyncio.sleep(1.0)
        assert engine._llm is not None
        # As when a core that was told to stop ends just when the first requests arrive.
        engine._llm.output_handler.cancel()
        victim.kill()
        await streams

    with pytest.raises(EngineError, match="the engine died: EngineCore was killed by SIGKILL"):
        loop.call(generate())


def test_a_worker_that_is_killed_within_a_sync(
    boot: Boot,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from holding import HoldingEngine

    marker = tmp_path / "marker"
    monkeypatch.setenv("COPRIS_TEST_PLACE", "sync")
    monkeypatch.setenv("COPRIS_TEST_MARKER", str(marker))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1] / "support")]))
    engine, loop = boot(HoldingEngine)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    sync(engine, loop.call, model.named_parameters())

    def kill() -> None:
        while not marker.exists():
            time.sleep(0.05)
        for worker in boot.workers():
            worker.kill()

    threading.Thread(target=kill).start()
    # vLLM says of what, unless it looks before there is an exit code.
    with pytest.raises(
        WeightSyncError, match=r"Worker\S* died unexpectedly( \(was killed by SIGK|,)"
    ):
        sync(engine, loop.call, model.named_parameters())


def test_an_engine_that_hangs_is_killed(boot: Boot) -> None:
    engine, loop = boot(deadlines=Deadlines(stall_s=3.0))
    threading.Timer(0.5, lambda: [worker.suspend() for worker in boot.workers()]).start()
    with pytest.raises(EngineError, match=r"died: it had work, and sent nothing for .*stall_s=3 s"):
        loop.call(generate_on(engine))


def test_a_sync_that_hangs_has_a_deadline(boot: Boot, tiny_checkpoint: Path) -> None:
    engine, loop = boot(deadlines=Deadlines(sync_s=2.0))
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    for worker in boot.workers():
        worker.suspend()
    with pytest.raises(WeightSyncError, match=r"within .*sync_s=2 s"):
        sync(engine, loop.call, model.named_parameters())
