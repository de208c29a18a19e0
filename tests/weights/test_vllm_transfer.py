"""vLLM's own weight transfer, from the trainer through real workers, and an engine that sleeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from builders import small_data, small_module
from copris_testing import SomePrompts
from some_rewards import ShareOfDigits

from copris_lightning import StalenessMonitor, WeightSync
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.errors import ConfigurationError, EngineError
from copris_lightning.policy.pretrained import load_model
from copris_lightning.weights.gather import full_weights


@pytest.mark.engines
def test_a_staged_run_with_vllms_transfer_and_a_sleeping_engine(
    untied_checkpoint: Path,
    cpu_engine_args: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import file_transfer

    from copris_lightning.weights import vllm_transfer

    monkeypatch.setattr(vllm_transfer, "IPCTrainerInitInfo", file_transfer.FileInitInfo)
    engine = file_transfer.FileTransferEngine(cpu_engine_args)
    sync = WeightSync()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[sync, StalenessMonitor()],
    )
    module = small_module(untied_checkpoint, lr=2.0)
    data = small_data(untied_checkpoint, engine, prompts=SomePrompts(), reward=ShareOfDigits())
    trainer.fit(module, data)
    # The weights did arrive, each time, and they did change.
    assert sync.version == 3
    assert sync.worst_parity < 1e-4
    update = ["start_weight_update", "finish_weight_update"]
    cycle = ["sleep 1", "wake_up ['weights']", *update, "wake_up ['kv_cache']"]
    assert engine.calls == [*update, *cycle, *cycle, *cycle]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transport": "rdma"}, "transport='rdma' must be files, ipc or nccl"),
        ({"sleep_level": 3}, "sleep_level=3 must be 1 or 2"),
    ],
)
def test_settings_that_do_not_exist_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VLLMEngine(**change)


@pytest.mark.parametrize(
    "change", [{"transport": "ipc"}, {"transport": "nccl"}, {"sleep_level": 1}]
)
def test_what_needs_a_gpu_says_so_before_it_boots(
    tiny_checkpoint: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [(name, value)] = change.items()
    with pytest.raises(ConfigurationError, match=rf"^{name}={value} needs a GPU"):
        VLLMEngine(**change).validate(EngineSpec(str(tiny_checkpoint), 4, 64, vocab_size=98))


def test_weights_that_were_thrown_away_have_to_be_sent_first(
    running_vllm: tuple[VLLMEngine, Callable[..., Any]],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, vLLM goes through the motions of sleeping and keeps its memory."""
    engine, call = running_vllm
    monkeypatch.setattr(engine.holds, "sleep_level", 2)
    call(engine.hold())
    with pytest.raises(EngineError, match="sleep_level=2 threw the weights away"):
        call(engine.release(engine.version + 1))
    model = load_model(str(tiny_checkpoint), dtype="float32", attn_implementation="eager")
    way = engine.transport(0, call)
    way.send(lambda: full_weights(model, model))
    call(engine.release(engine.version + 1))
    way.close()
