"""vLLM's own ways for weights from the trainer's ranks to an engine: CUDA IPC, NCCL."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    WeightSource,
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from copris_lightning.weights.files import FilesTransport
    from copris_lightning.weights.transport import Run, Weights


class TransferReceiver(Protocol):
    """The engine's part in vLLM's own transfer, besides what vLLM asks of it."""

    async def begin_transfer(self) -> None:
        """Be ready for weights by vLLM's own transfer."""
        ...

    async def end_transfer(self) -> None:
        """They were sent.

        Raises:
            WeightSyncError: the engine does not compute with them.
        """
        ...


class FullWeights(WeightSource):
    """The trainer's weights as vLLM wants to be given them; all ranks go through them together.

    Args:
        weights: begins a pass over names and full tensors.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        # Split weights only show their full shape when put together: look at each once.
        self._metadata = [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in weights()]

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of each."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and full tensors."""
        return self.weights()


class WeightSyncClient:
    """What vLLM's sending side calls on the engine, from whichever thread.

    Args:
        llm: the engine.
        run: runs a coroutine on the engine's loop and waits for it.
    """

    def __init__(self, llm: AsyncLLM, run: Run) -> None:
        self._llm = llm
        self._run = run

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Have the workers meet the sender."""
        self._call(self._llm.init_weight_transfer_engine, WeightTransferInitRequest(init_info))

    def start_weight_update(self) -> None:
        """Begin an update."""
        self._call(self._llm.start_weight_update)

    def update_weights(self, update_info: Any) -> None:
        """Have the workers receive some weights."""
        self._call(self._llm.update_weights, WeightTransferUpdateRequest(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update."""
        self._call(self._llm.finish_weight_update, weight_version)

    def _call(self, method: Callable[..., Awaitable[None]], *args: Any) -> None:
        async def call() -> None:
            await method(*args)

        self._run(call())


class VLLMTransfer:
    """Weights through vLLM's own transfer, from all ranks. See
    :class:`~copris_lightning.weights.transport.Transport`.

    Args:
        backend: of vLLM's weight transfer.
        receiver: the engine; it is called on rank 0 only.
        llm: vLLM's, on rank 0.
        rank: of this process in the trainer.
        run: on rank 0, reaches the engine's loop.
        files: for what the engine is to be shown in files.
        keep_host_copy: write each set to ``files`` too, which an engine can be started from.
            Without it all ranks have to send again.
    """

    def __init__(
        self,
        backend: str,
        receiver: TransferReceiver,
        llm: AsyncLLM | None,
        rank: int,
        run: Run,
        files: FilesTransport,
        *,
        keep_host_copy: bool = False,
    ) -> None:
        self._backend = backend
        self._receiver = receiver
        self._llm = llm
        self._rank = rank
        self._run = run
        self._files = files
        self._keeps = keep_host_copy
        self._sender: tuple[FullWeights, Callable[[], None]] | None = None

    def send(self, weights: Weights) -> None:
        """From all ranks to the engine's workers, through a bounded buffer.

        Raises:
            WeightSyncError: on rank 0, the engine does not compute with them.
        """
        if self._rank == 0:
            self._run(self._receiver.begin_transfer())
        if self._sender is None:
            source = FullWeights(weights)
            self._sender = (source, self._new_sender(source))
        source, send = self._sender
        source.weights = weights
        send()
        if self._keeps:
            self._files.keep(weights)
        if self._rank == 0:
            self._run(self._receiver.end_transfer())

    def restore(self) -> None:
        """Give the host copy to an engine that has booted again; all ranks meet it at the next
        send.

        Raises:
            WeightSyncError: there is none, or the engine did not take it.
        """
        self._sender = None
        self._files.restore()

    def explain(self, weights: Weights) -> str:
        """See :class:`~copris_lightning.weights.transport.Transport`."""
        return self._files.explain(weights)

    def close(self) -> None:
        """Remove the host copy. May be called twice."""
        self._files.close()

    def _new_sender(self, source: FullWeights) -> Callable[[], None]:
        """vLLM's function that sends the source's weights; made and called on every rank."""
        info: TrainerInitInfo
        if self._backend == "nccl":
            # Other ranks take no part in the group of the sender and the engine's workers.
            llm = self._llm
            workers = 0 if llm is None else llm.vllm_config.parallel_config.world_size_across_dp
            info = NCCLTrainerInitInfo(
                master_address=socket.gethostbyname(socket.gethostname()),
                master_port=_free_port(),
                world_size=1 + workers,
                rank=self._rank,
            )
        else:
            # Packed: a bounded buffer, instead of all weights at once.
            info = IPCTrainerInitInfo(packed=True, rank=self._rank)
        client: Any = None if self._llm is None else WeightSyncClient(self._llm, self._run)
        sender = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
        send: Callable[[], None] = sender.send_weights
        return send


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port
