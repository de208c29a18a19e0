"""An engine elsewhere: vLLM servers started with `copris serve`, on this machine or on others."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import resource
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from copris_lightning.core.segments import Span
from copris_lightning.engines.engine import Chunk, Ending, EngineSpec, GenerationRequest, Load
from copris_lightning.engines.gate import Gate
from copris_lightning.engines.server_client import (
    LostError,
    RefusedError,
    ServerFacts,
    Timeouts,
    VLLMServer,
)
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.weights.files import FilesTransport, check_hand_over, hand_over_prefix
from copris_lightning.weights.transport import Run, Transport

T = TypeVar("T")

API_KEY_VARIABLE = "VLLM_API_KEY"
"""Holds the servers' key, if they ask for one; vLLM's servers read it from there, too."""

_OTHER_FILES = 256
"""Files that a trainer has open besides one connection per trajectory in flight, at most."""

_ENDINGS: dict[str | None, Ending | None] = {
    None: None,
    "stop": "stop",
    "length": "length",
    "abort": "held",
}
"""Of vLLM's finish reasons."""

_log = logging.getLogger(__name__)


class VLLMServerEngine:
    """Generates with vLLM servers; each request goes to the one with the fewest in flight.

    A server that dies or falls silent takes nothing with it: what it was generating goes on
    elsewhere, from the last token received. It is left out until the next weight sync, which
    takes it back if it answers again. When none is left, requests fail.

    Tokens are labelled by the servers: spans come with the end of each response. Of what a server
    made that was lost within a response they are not known; it bears the version under which the
    request went there, the oldest that it can be.

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
        self._gate = Gate()
        self._keeps = self._has_new_weights = False
        self._turn = itertools.count()
        self._spec: EngineSpec | None = None
        self._http: aiohttp.ClientSession | None = None
        self._servers: list[VLLMServer] = []

    @property
    def version(self) -> int:
        """Policy version of the weights that generate now."""
        return self._gate.version

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
        check_hand_over(self.sync_directory, spec.model)
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

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response, by as many servers as it takes. See :class:`Engine`."""
        endings, nothing = self._gate.endings, () if request.decoding.logprobs else None
        tokens: list[int] = []
        spans: tuple[Span, ...] = ()
        while True:
            begun = len(tokens)
            async with self._gate.passing(endings) as may_pass:
                if not may_pass:
                    yield Chunk((), nothing, self.version, "held", spans)
                    return
                server, started = min(self._live(), key=lambda live: live.in_flight), self.version
                pieces = server.generate(self._body(request, tokens))
            try:
                async with aclosing(pieces):
                    async for piece in pieces:
                        tokens += piece.token_ids
                        if piece.reason == "abort" and endings == self._gate.endings:
                            raise LostError(f"{server.url} ended a response by itself")
                        ending = _ENDINGS[piece.reason]
                        if ending is not None:
                            spans += self._gate.spans(started, piece.made)
                        yield Chunk(
                            piece.token_ids,
                            piece.logprobs if piece.token_ids and nothing is not None else nothing,
                            started,
                            ending,
                            spans if ending else (),
                        )
                return
            except (LostError, RefusedError) as error:
                self._lose(server, error)
                spans += self._gate.spans(started, [(len(tokens) - begun, started)])

    def _body(self, request: GenerationRequest, tokens: list[int]) -> dict[str, Any]:
        """What a server is asked for, after the response's first tokens."""
        decoding = request.decoding
        ids = [*request.token_ids, *tokens]
        params = {
            **decoding.sampling.distribution,
            "logprobs": 0 if decoding.logprobs else None,
            "max_tokens": request.max_new_tokens - len(tokens),
            # Only what is asked for ends a response, as in VLLMEngine.
            "stop_token_ids": decoding.stop_token_ids,
            "ignore_eos": True,
            "seed": (request.seed + len(ids)) % 2**63 if self.request_seeds else None,
            "detokenize": False,
        }
        return {
            "request_id": request.request_id,
            "token_ids": ids,
            "sampling_params": params,
            "cache_salt": str(self.version),
        }

    async def hold(self, *, keep: bool = False) -> None:
        """Stop all servers. See :class:`Engine`."""
        await self._gate.shut(keep=keep)
        self._keeps = keep

        async def one(server: VLLMServer) -> None:
            try:
                await server.hold(keep=keep)
            except (LostError, RefusedError) as error:
                self._lose(server, error)

        # A sync may take servers back, even if none is left now.
        await _all(one(server) for server in self._servers if server.lost is None)

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        """Let all servers generate. See :class:`Engine`."""
        await self._on_all(lambda server: server.release(version, clear_kv=clear_kv))
        self._keeps = self._has_new_weights = False
        self._gate.open(version, clear_kv=clear_kv)

    def load(self) -> Load | None:
        """Counted here, over the servers in use."""
        live = [server for server in self._servers if server.lost is None]
        running = sum(min(server.in_flight, server.max_num_seqs) for server in live)
        return Load(running, sum(server.in_flight for server in live) - running)

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

        if self._keeps:  # as in VLLMEngine
            now = self.version + self._has_new_weights
            await self._on_all(lambda server: server.release(now, clear_kv=False))
        try:
            return await _all(one(tokens) for tokens in sequences)
        finally:
            if self._keeps:
                await self._on_all(lambda server: server.hold(keep=True))

    # -- weights: see :class:`copris_lightning.weights.transport.Receiver` -------------------

    def transport(self, rank: int, run: Run) -> Transport:
        """Through files that the servers see. See :class:`Engine`."""
        return FilesTransport(self, self.sync_directory, rank, run)

    async def begin_load(self) -> None:
        """Take back the servers that were lost and answer again, and get all ready."""
        if self._gate.is_open:
            raise WeightSyncError("new weights have come while the servers generate; hold them")
        await _all(self._readmit(server) for server in self._servers if server.lost is not None)
        self._has_new_weights = True
        await self._on_all(lambda server: server.load("begin_shards"))

    async def load_shard(self, path: Path) -> None:
        """Have all servers load a file."""
        await self._on_all(lambda server: server.load("load_shard", str(path)))

    async def end_load(self) -> None:
        """Have them say what arrived.

        Raises:
            WeightSyncError: not what was sent.
        """
        await self._on_all(lambda server: server.end_load())

    async def load_adapter(self, folder: Path) -> None:
        """Refused by :meth:`validate` already."""
        raise WeightSyncError("servers take whole weights only")

    async def explain(self, paths: Sequence[Path]) -> str:
        """Ask every server which tensors differ."""
        answers: list[str] = []

        async def one(server: VLLMServer) -> None:
            answers.append(f"{server.url}: {await server.explain([str(p) for p in paths])}")

        await self._on_all(one)
        return "; ".join(sorted(answers))

    def kill(self) -> None:
        """There is nothing of theirs to end here."""

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
        parent, prefix = os.path.split(hand_over_prefix(self.sync_directory))
        port = urlsplit(server.url).port or 80
        code = " --trust-remote-code" if self._spec.trust_remote_code else ""
        start = f"start it with `copris serve --model {self._spec.model} --port {port}{code}`"
        try:
            with tempfile.NamedTemporaryFile(prefix=prefix, dir=parent) as file:
                facts = await server.facts(file.name)
        except LostError as error:
            raise ConfigurationError(f"{name} does not answer; {start} ({error})") from error
        except RefusedError as error:
            cure = f"set {API_KEY_VARIABLE} to its key" if error.status == 401 else start
            raise ConfigurationError(f"{name} refuses a request; {cure} ({error})") from error
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigurationError(f"{name} is no vLLM server; {start}") from error
        if not facts.sees_file:
            raise ConfigurationError(
                f"sync_directory={self.sync_directory!r}: {server.url} does not see {file.name}, "
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

    async def _on_all(self, work: Callable[[VLLMServer], Awaitable[Any]]) -> None:
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
