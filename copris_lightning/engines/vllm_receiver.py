"""How weights get into vLLM's workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copris_lightning.errors import WeightSyncError
from copris_lightning.weights.adapter import ADAPTER_ID
from copris_lightning.weights.arrival import fault

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


class VLLMReceiver(ABC):
    """The part of an engine that weights come to, through files or vLLM's own transfer: see
    :class:`~copris_lightning.weights.transport.Receiver` and
    :class:`~copris_lightning.weights.vllm_transfer.TransferReceiver`."""

    _adapter: LoRARequest | None = None

    async def begin_load(self) -> None:
        """Wake the memory of the weights only, so that the old KV cache need not fit beside what
        the load takes."""
        await self._begin()
        await self._on_workers("begin_shards", doing="begin to load")

    async def load_shard(self, path: Path) -> None:
        """Have all workers load a file."""
        await self._on_workers("load_shard", str(path), doing="load the weights")

    async def end_load(self) -> None:
        """Have them say what arrived.

        Raises:
            WeightSyncError: not what was sent.
        """
        _check_arrival(await self._on_workers("end_shards", doing="report what arrived"))

    async def load_adapter(self, folder: Path) -> None:
        """Replace the adapter that all requests from now on are answered with.

        Raises:
            WeightSyncError: the workers apply something else.
        """
        from vllm.lora.request import LoRARequest

        llm = await self._begin()
        load = llm.add_lora(LoRARequest("policy", ADAPTER_ID, str(folder), load_inplace=True))
        await self._call(load, "load the adapter")
        # Not loaded in place again: requests only name it.
        self._adapter = LoRARequest("policy", ADAPTER_ID, str(folder))
        file = str(folder / "adapter_model.safetensors")
        _check_arrival(await self._on_workers("adapter_report", file, doing="report what arrived"))

    async def begin_transfer(self) -> None:
        """As :meth:`begin_load`, before vLLM's own transfer."""
        await self._begin()
        await self._on_workers("watch_transfer", doing="watch the transfer")

    async def end_transfer(self) -> None:
        """As :meth:`end_load`, after it."""
        _check_arrival(await self._on_workers("transfer_report", doing="report what arrived"))

    async def explain(self, paths: Sequence[Path]) -> str:
        """Ask the workers which tensors differ."""
        names = [str(path) for path in paths]
        answers = await self._on_workers("explain_mismatch", names, doing="compare the weights")
        return "; ".join(dict.fromkeys(answers))

    @abstractmethod
    async def _begin(self) -> AsyncLLM:
        """Get ready for new weights."""

    @abstractmethod
    async def _running(self) -> AsyncLLM:
        """The engine, if it lives."""

    @abstractmethod
    async def _call(self, work: Awaitable[Any], doing: str) -> Any:
        """Wait for a call to it; says what for, if it fails."""

    async def _on_workers(self, method: str, *args: Any, doing: str) -> list[Any]:
        llm = await self._running()
        results: list[Any] = await self._call(llm.collective_rpc(method, args=args), doing)
        return results


def _check_arrival(reports: list[dict[str, Any]]) -> None:
    found = fault(reports)
    if found is not None:
        raise WeightSyncError(f"the weights did not arrive in the engine: {found}")
