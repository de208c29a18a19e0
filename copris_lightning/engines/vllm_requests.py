"""Requests on their way through vLLM."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from copris_lightning.engines.engine import Chunk, Ending
from copris_lightning.engines.gate import Gate
from copris_lightning.engines.vllm_processes import VLLMProcesses
from copris_lightning.errors import EngineError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

ENDINGS: dict[str | None, Ending | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "abort": "held",
}
"""Of the finish reasons of vLLM, and of its servers."""


class VLLMRequests:
    """Hands requests to vLLM and reads what it answers.

    Args:
        processes: the engine's.
    """

    def __init__(self, processes: VLLMProcesses) -> None:
        self._processes = processes

    async def add(
        self, llm: AsyncLLM, request_id: str, prompt: Any, params: Any, adapter: Any
    ) -> Any:
        """Hand a request over; when this returns, it is on its way before any later call.

        Returns:
            what collects its outputs.
        """
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await llm.add_request(request_id, prompt, params, lora_request=adapter)
        except EngineDeadError as error:
            raise await self._processes.death() from error
        except (VLLMValidationError, ValueError) as error:
            raise EngineError(f"vLLM refused request {request_id}: {error}") from error

    async def read(self, llm: AsyncLLM, collector: Any) -> AsyncGenerator[Any, None]:
        """A request's outputs; aborts it when left early."""
        from vllm.v1.engine.exceptions import EngineDeadError

        is_over = False
        try:
            with self._processes.silence.working():
                while not is_over:
                    output = collector.get_nowait() or await collector.get()
                    is_over = output.finished
                    self._processes.silence.heard()
                    yield output
        except EngineDeadError as error:
            is_over = True
            raise await self._processes.death() from error
        finally:
            if not is_over:
                await llm.abort(collector.request_id, internal=True)
            collector.close()


def as_chunk(output: Any, started: int, gate: Gate, *, logprobs: bool) -> Chunk:
    """An output of vLLM's.

    Args:
        output: of a request that is streamed.
        started: version under which the request went in.
        gate: the engine's.
        logprobs: whether it was asked for them.
    """
    completion = output.outputs[0]
    ending = ENDINGS[completion.finish_reason]
    made = [(s.end - s.start, int(s.version)) for s in completion.weight_versions or ()]
    values: tuple[float, ...] | None = () if logprobs else None
    if logprobs and completion.token_ids:
        # Flat log-probs hold one entry per token here, the sampled one's.
        values = tuple(completion.logprobs.logprobs)
    return Chunk(
        token_ids=tuple(completion.token_ids),
        logprobs=values,
        version=started,
        ending=ending,
        spans=gate.spans(started, made) if ending else (),
    )
