"""vLLM's own ways for weights from the trainer's ranks to an engine: CUDA IPC, NCCL."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

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

    from copris_lightning.weights.transport import Run, Weights


class FullWeights(WeightSource):
    """The trainer's weights as vLLM wants to be given them; all ranks go through them together.

    Args:
        weights: begins a pass over names and full tensors.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        # Split weights only show their full shape when put together: look at each once.
        self._metadata = [ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in weights()]

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of each."""
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and full tensors."""
        return self._weights()


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


def new_sender(
    backend: str, weights: Weights, rank: int, llm: AsyncLLM | None, run: Run
) -> Callable[[], None]:
    """A function that sends the weights; made on every rank, and called on every rank.

    Args:
        backend: of vLLM's weight transfer.
        weights: begins a pass over names and full tensors.
        rank: of this process in the trainer; rank 0 talks to the engine.
        llm: the engine, on rank 0.
        run: runs a coroutine on the engine's loop and waits for it.
    """
    info: TrainerInitInfo
    if backend == "nccl":
        # Other ranks take no part in the group of the sender and the engine's workers.
        workers = 0 if llm is None else llm.vllm_config.parallel_config.world_size_across_dp
        info = NCCLTrainerInitInfo(
            master_address=socket.gethostbyname(socket.gethostname()),
            master_port=_free_port(),
            world_size=1 + workers,
            rank=rank,
        )
    else:
        # Packed: a bounded buffer, instead of all weights at once.
        info = IPCTrainerInitInfo(packed=True, rank=rank)
    client: Any = None if llm is None else WeightSyncClient(llm, run)
    sender = WeightTransferTrainerFactory.trainer_init(
        info, client=client, source=FullWeights(weights)
    )
    send: Callable[[], None] = sender.send_weights
    return send


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return port
