"""An engine elsewhere: vLLM servers started with `copris serve`, on this machine or on others."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import resource
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
from torch import Tensor

from copris_lightning.engines.engine import Chunk, EngineSpec, GenerationRequest
from copris_lightning.engines.server_client import (
    LostError,
    RefusedError,
    ServerFacts,
    Timeouts,
    VLLMServer,
)
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.weights.files import check_hand_over, handed_over

T = TypeVar("T")

API_KEY_VARIABLE = "VLLM_API_KEY"
"""Holds the servers' key, if they ask for one; vLLM's servers read it from there, too."""

_OTHER_FILES = 256
"""Files that a trainer has open besides one connection per trajectory in flight, at most."""

_log = logging.getLogger(__name__)


class VLLMServerEngine:
    """Generates with vLLM servers; each request goes to the one with the fewest in flight.

    A server that dies or falls silent takes nothing with it: what it was generating goes on
    elsewhere, from the last token received. It is left out until the next weight sync, which
    takes it back if it answers again. When none is left, requests fail.

    Args:
        urls: of the servers, such as ``http://10.0.0.7:8000``; they serve this run alone.
        sync_directory: where weights are handed over: a directory that trainer and servers see
            under the same path. By default shared memory, which is right on one machine only.
        request_seeds: give every request its own random generator, which makes its tokens
            independent of what else is in the batch; slower.
        connect_timeout_s: how long a server may take to accept a connection, or to answer a
            question that takes no work.
        stall_timeout_s: how long a server may send nothing at all while it has work.
        sync_timeout_s: how long a server may take to load weights.
    """

    def __init__(
        self,
        urls: list[str],
        sync_directory: str | None = None,
        request_seeds: bool = False,
        connect_timeout_s: float = 10.0,
        stall_timeout_s: float = 120.0,
        sync_timeout_s: float = 600.0,
    ) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self.sync_directory = sync_directory
        self.request_seeds = request_seeds
        self.connect_timeout_s = connect_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self.sync_timeout_s = sync_timeout_s
        self._version = 0
        self._turn = itertools.count()
        self._spec: EngineSpec | None = None
        self._http: aiohttp.ClientSession | None = None
        self._servers: list[VLLMServer] = []

    @property
    def version(self) -> int:
        """Policy version of the weights that generate now."""
        return self._version

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """An ordinary asyncio loop."""
        return asyncio.new_event_loop()

    def validate(self, spec: EngineSpec) -> None:
        """Check the settings; :meth:`start` checks the servers.

        Raises:
            ConfigurationError: names the setting that cannot work.
        """
        if spec.adapter is not None:
            raise ConfigurationError("servers take whole weights only; set lora.sync=merge")
        if not self.urls:
            raise ConfigurationError("urls=[] names no server")
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigurationError(f"urls: {url!r} is no URL such as http://127.0.0.1:8000")
        if len(set(self.urls)) < len(self.urls):
            raise ConfigurationError(f"urls={self.urls} names a server twice")
        for name in ("connect_timeout_s", "stall_timeout_s", "sync_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be a number above 0")
        check_hand_over(self.sync_directory)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = spec.max_num_seqs + _OTHER_FILES
        if files != resource.RLIM_INFINITY and files < needed:
            raise ConfigurationError(
                f"a flow.cap of {spec.max_num_seqs} takes as many connections to the "
                f"servers, but this process may open {files} files: run `ulimit -n {needed}` first"
            )

    async def start(self, spec: EngineSpec) -> None:
        """Contact every server, and check that it is what the run needs.

        Raises:
            ConfigurationError: names the server, what is wrong with it and what to do.
        """
        self.validate(spec)
        self._spec = spec
        key = os.environ.get(API_KEY_VARIABLE)
        self._http = aiohttp.ClientSession(
            # A connection per request: one kept open may be closed just as it is used again.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, connect=self.connect_timeout_s),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        timeouts = Timeouts(self.connect_timeout_s, self.stall_timeout_s, self.sync_timeout_s)
        self._servers = [VLLMServer(url, self._http, timeouts) for url in self.urls]
        try:
            facts = await _all(self._admit(server) for server in self._servers)
        except BaseException:
            await self.close()
            raise
        at_once = sum(fact.max_num_seqs for fact in facts)
        if at_once < spec.max_num_seqs:
            _log.warning(
                f"flow.cap={spec.max_num_seqs} trajectories are in flight, but the "
                f"servers generate {at_once} at once (per data-parallel rank) and the others "
                "wait: start them with a larger --max-num-seqs"
            )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response, by as many servers as it takes. See :class:`Engine`."""
        decoding = request.decoding
        tokens = list(request.token_ids)
        end = len(tokens) + request.max_new_tokens
        while True:
            server = min(self._live(), key=lambda live: live.in_flight)
            params = {
                **decoding.sampling.distribution,
                "logprobs": 0 if decoding.logprobs else None,
                "max_tokens": end - len(tokens),
                # Only what is asked for ends a response, as in VLLMEngine.
                "stop_token_ids": decoding.stop_token_ids,
                "ignore_eos": True,
                "seed": (request.seed + len(tokens)) % 2**63 if self.request_seeds else None,
            }
            try:
                stream = server.generate(tuple(tokens), params, request.request_id)
                async with aclosing(stream) as parts:
                    async for token_ids, logprobs, reason in parts:
                        tokens += token_ids
                        yield Chunk(token_ids, logprobs, self._version, reason)
                return
            except (LostError, RefusedError) as error:
                self._lose(server, error)

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Have all servers load the weights, also those that were lost and answer again."""
        in_flight = sum(server.in_flight for server in self._servers)
        if in_flight:
            raise WeightSyncError(f"{in_flight} requests are in flight during a sync")
        await _all(self._readmit(server) for server in self._servers if server.lost)
        with handed_over(weights, self.sync_directory) as path:
            await self._on_all(lambda server: server.load(path))
        self._version = version

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs of the model's own distribution by the servers' prefill. They take turns, so
        that each is probed sooner or later. See :class:`Engine`."""

        async def one(tokens: Sequence[int]) -> list[float]:
            while True:
                live = self._live()
                server = live[next(self._turn) % len(live)]
                try:
                    return await server.score(tokens)
                except (LostError, RefusedError) as error:
                    self._lose(server, error)

        return await _all(one(tokens) for tokens in sequences)

    async def explain_mismatch(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """Ask every server which tensors differ from these weights."""
        answers: list[str] = []

        async def explain(server: VLLMServer) -> None:
            answers.append(f"{server.url}: {await server.explain_mismatch(path)}")

        with handed_over(weights, self.sync_directory) as path:
            await self._on_all(explain)
        return "; ".join(sorted(answers))

    async def close(self) -> None:
        """Close the connections; the servers go on."""
        http, self._http = self._http, None
        self._servers = []
        if http is not None:
            await http.close()

    # -- servers come and go ---------------------------------------------------------------

    async def _admit(self, server: VLLMServer) -> ServerFacts:
        """Take a server into use.

        Raises:
            ConfigurationError: it does not answer, or is not what the run needs.
        """
        assert self._spec is not None
        name = f"urls: {server.url}"
        port = urlsplit(server.url).port or 80
        code = " --trust-remote-code" if self._spec.trust_remote_code else ""
        start = f"start it with `copris serve --model {self._spec.model} --port {port}{code}`"
        try:
            with handed_over((), self.sync_directory) as path:
                facts = await server.facts(path)
        except LostError as error:
            raise ConfigurationError(f"{name} does not answer; {start} ({error})") from error
        except RefusedError as error:
            cure = f"set {API_KEY_VARIABLE} to its key" if error.status == 401 else start
            raise ConfigurationError(f"{name} refuses a request; {cure} ({error})") from error
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{name} is no vLLM server; {start}") from error
        if not facts.sees_file:
            raise ConfigurationError(
                f"sync_directory={self.sync_directory!r}: {server.url} does not see {path}, "
                "which was just written; name a directory that trainer and servers share"
            )
        problem = _problem(facts, self._spec)
        if problem is not None:
            raise ConfigurationError(f"{name} {problem}; {start}")
        server.lost = None
        return facts

    async def _readmit(self, server: VLLMServer) -> None:
        try:
            await self._admit(server)
        except ConfigurationError as error:
            server.lost = str(error)
        else:
            _log.warning(f"{server.url} is back")

    def _lose(self, server: VLLMServer, error: LostError | RefusedError) -> None:
        """Go on without a server that is lost or broken; raise what is a request's own fault."""
        if isinstance(error, RefusedError) and error.status < 500:
            raise error
        if server.lost is None:
            server.lost = str(error)
            _log.warning(f"going on without a server: {error}")

    def _live(self) -> list[VLLMServer]:
        """The servers in use: at least one."""
        live = [server for server in self._servers if server.lost is None]
        if not live:
            reasons = "; ".join(server.lost or "" for server in self._servers) or "not started"
            raise EngineError(f"no server of engine.urls={self.urls} is left: {reasons}")
        return live

    async def _on_all(self, work: Callable[[VLLMServer], Awaitable[None]]) -> None:
        """Do something on all servers in use; at least one must live through it."""

        async def one(server: VLLMServer) -> None:
            try:
                await work(server)
            except LostError as error:
                self._lose(server, error)

        await _all(one(server) for server in self._live())
        self._live()


def _problem(facts: ServerFacts, spec: EngineSpec) -> str | None:
    """What keeps a server from being the engine of a run."""
    if not facts.models & {spec.model, os.path.realpath(spec.model)}:
        return f"serves {sorted(facts.models)}, not model={spec.model!r}"
    if facts.max_model_len < spec.max_model_len:
        return (
            f"takes {facts.max_model_len} tokens, {spec.max_model_len} are needed for "
            "task.max_prompt_tokens and task.sampling.max_new_tokens (--max-model-len)"
        )
    if facts.logprobs_mode != "processed_logprobs":
        return f"returns {facts.logprobs_mode}, not those of the sampled distribution"
    return None


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, once the last has ended; raises the first error if there is one."""
    results: list[Any] = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
