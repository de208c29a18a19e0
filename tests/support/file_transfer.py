"""A backend for vLLM's weight transfer that a CPU can run: chunks of weights in files.

The control plane, the workers' reloading and the trainer's side of it are vLLM's own; only how the
bytes travel differs from its ``ipc`` and ``nccl``. Imported in the trainer and in the worker.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine

from copris_lightning.engines.vllm import VLLMEngine
from copris_lightning.engines.vllm_worker import CoprisWorkerExtension


@dataclass
class InitInfo(WeightTransferInitInfo):
    directory: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    path: str


class Receiver(IPCWeightTransferEngine):
    """The worker's side; reloading as for CUDA IPC."""

    init_info_cls: Any = InitInfo
    update_info_cls: Any = UpdateInfo

    def init_transfer_engine(self, init_info: Any) -> None:
        self.directory = init_info.directory

    def receive_weights(self, update_info: Any) -> None:
        assert update_info.path.startswith(self.directory)
        weights = load_file(update_info.path)
        assert list(weights) == sorted(update_info.names)
        self.model.load_weights(weights.items())


@dataclass
class FileInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "files_in_chunks"
    packed: bool = True


class Sender(TrainerWeightTransferEngine[FileInitInfo]):
    """The trainer's side: two weights a chunk."""

    init_info_cls = FileInitInfo

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Any:
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        sender.directory = tempfile.mkdtemp()
        if sender.is_sender:
            client.init_weight_transfer_engine(asdict(InitInfo(sender.directory)))
        return sender

    def send_weights(self) -> None:
        assert self.source is not None
        expected = [(m.name, m.dtype, m.shape) for m in self.source.metadata()]
        tensors = list(self.source)
        assert [(n, t.dtype, tuple(t.shape)) for n, t in tensors] == expected
        if not self.is_sender:
            return
        self.client.start_weight_update()
        for i in range(0, len(tensors), 2):
            chunk = dict(tensors[i : i + 2])
            path = str(Path(self.directory) / f"{i}.safetensors")
            save_file({n: t.contiguous() for n, t in chunk.items()}, path)
            self.client.update_weights(asdict(UpdateInfo(list(chunk), path)))
        self.client.finish_weight_update()


WeightTransferEngineFactory.register_engine(FileInitInfo.backend, Receiver)
WeightTransferTrainerFactory.register_engine(FileInitInfo.backend, Sender)


class ReceivingExtension(CoprisWorkerExtension):
    """Has the worker import this module."""


class FileTransferEngine(VLLMEngine):
    """A vLLM engine that gets its weights this way and sleeps between stages.

    On a CPU, vLLM goes through the motions of sleeping and keeps its memory.
    """

    worker_extension: ClassVar[str] = "file_transfer.ReceivingExtension"

    def __init__(self, engine_args: dict[str, Any]) -> None:
        super().__init__(engine_args)
        self.backend = FileInitInfo.backend
        self.calls: list[str] = []

    def _check_gpu(self) -> None:
        pass

    async def start(self, spec: Any) -> None:
        await super().start(spec)
        self.holds.sleep_level = 1
        llm = await self._running()
        for name in ("sleep", "wake_up", "start_weight_update", "finish_weight_update"):
            setattr(llm, name, self._noting(name, getattr(llm, name)))

    def _noting(self, name: str, method: Any) -> Any:
        async def call(*args: Any) -> Any:
            self.calls.append(" ".join([name, *(str(a) for a in args if a is not None)]))
            return await method(*args)

        return call
