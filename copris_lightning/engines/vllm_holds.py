"""vLLM held and let go: its requests, the versions that they are labelled with, its memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal

from copris_lightning.engines.gate import Gate
from copris_lightning.engines.vllm_processes import VLLMProcesses
from copris_lightning.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class VLLMHolds:
    """Holds one engine, from its start on. All coroutines run on the engine's loop.

    Args:
        processes: the engine's.
        sleep_level: how it gives memory away when it is held; ``None``: it does not.

    Attributes:
        gate: what requests pass on their way in.
    """

    def __init__(self, processes: VLLMProcesses, sleep_level: Literal[1, 2] | None) -> None:
        self.gate = Gate()
        self._processes = processes
        self.sleep_level = sleep_level
        self._keeps = False  # whether requests stand in it
        self._asleep: set[str] = set()  # the parts of its memory that it has given away

    async def hold(self, llm: AsyncLLM, *, keep: bool) -> None:
        """Stop generating. See :class:`~copris_lightning.engines.engine.Engine`."""
        await self.gate.shut(keep=keep)
        if llm.get_num_unfinished_requests() or self._keeps:
            # Every request has gone in, so that vLLM ends, or freezes, all there are.
            await self._pause(llm, keep=keep)
        self._keeps = keep and llm.get_num_unfinished_requests() > 0
        if not self._keeps:
            # Nothing is left to run, and nothing comes through the gate; what scores may.
            await self._go_on(llm)
        if self.sleep_level is not None and not self._asleep:
            await self._processes.call(llm.sleep(self.sleep_level), "sleep")
            self._asleep = {"weights", "kv_cache"}

    async def release(self, llm: AsyncLLM, version: int, *, clear_kv: bool) -> None:
        """Generate again. See :class:`~copris_lightning.engines.engine.Engine`.

        Raises:
            EngineError: ``sleep_level=2`` threw the weights away, and none have come since.
        """
        await self._wake(llm, ["weights", "kv_cache"])
        await self._label(llm, version)
        if clear_kv:
            # What was kept is computed again.
            drop = llm.reset_prefix_cache(reset_running_requests=self._keeps)
            if not await self._processes.call(drop, "drop its prefixes"):
                raise EngineError("vLLM did not drop the prefixes computed with the old weights")
        if self._keeps:
            await self._go_on(llm)
        self._keeps = False
        self.gate.open(version, clear_kv=clear_kv)

    async def get_ready(self, llm: AsyncLLM) -> None:
        """Make room for new weights.

        Raises:
            WeightSyncError: it generates.
        """
        self.gate.renew()
        await self._wake(llm, ["weights"], for_weights=True)

    @asynccontextmanager
    async def computing(self, llm: AsyncLLM) -> AsyncIterator[None]:
        """For the block, let it compute, held or not; what it keeps goes on meanwhile.

        One that sleeps is awake until the next hold.

        Raises:
            EngineError: as in :meth:`release`.
        """
        await self._wake(llm, ["weights", "kv_cache"])
        if self._keeps:
            await self._label(llm, self.gate.label)
            await self._go_on(llm)
        try:
            yield
        finally:
            if self._keeps:
                await self._pause(llm, keep=True)

    async def _pause(self, llm: AsyncLLM, *, keep: bool) -> None:
        pause = llm.pause_generation(mode="keep" if keep else "abort", clear_cache=False)
        await self._processes.call(pause, "pause")
        self._processes.silence.rest(True)

    async def _go_on(self, llm: AsyncLLM) -> None:
        self._processes.silence.rest(False)
        await self._processes.call(llm.resume_generation(), "go on")

    async def _label(self, llm: AsyncLLM, version: int) -> None:
        """Have what is made from now on bear a version; nothing is being made."""
        await self._processes.call(llm.update_weight_version(str(version)), "note the version")

    async def _wake(self, llm: AsyncLLM, parts: list[str], *, for_weights: bool = False) -> None:
        """Take memory back.

        Args:
            llm: the engine.
            parts: of ``weights`` and ``kv_cache``.
            for_weights: new ones are about to be written.

        Raises:
            EngineError: there would be no weights in it.
        """
        asleep = [part for part in parts if part in self._asleep]
        if self.sleep_level == 2 and "weights" in asleep and not for_weights:
            raise EngineError(
                "engine.sleep_level=2 threw the weights away, and no sync has come since; use 1"
            )
        if asleep:
            await self._processes.call(llm.wake_up(asleep), "wake up")
            self._asleep -= set(asleep)
