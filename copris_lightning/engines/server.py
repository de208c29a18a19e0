"""An engine elsewhere: vLLM servers started with `copris serve`, on this machine or on others."""

from __future__ import annotations

import asyncio
import logging
import math
import resource
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from copris_lightning.core.cap import Load
from copris_lightning.core.segments import Span
from copris_lightning.engines.engine import Chunk, EngineSpec, GenerationRequest
from copris_lightning.engines.gate import Gate
from copris_lightning.engines.server_client import VLLMServer
from copris_lightning.engines.server_fleet import Fleet, all_of
from copris_lightning.engines.server_http import LostError, RefusedError, Timeouts
from copris_lightning.engines.vllm_requests import ENDINGS
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.weights.files import FilesTransport, check_hand_over
from copris_lightning.weights.transport import Run, Transport

_OTHER_FILES = 256
"""Files that a trainer has open besides one connection per trajectory in flight, at most."""

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
        self._keeps = False
        self._fleet: Fleet | None = None

    @property
    def version(self) -> int:
        """Policy version of the weights that generate now."""
        return self._gate.version

    @property
    def servers(self) -> list[VLLMServer]:
        """All of them in the order of ``urls``, the lost ones too; none before the start."""
        return [] if self._fleet is None else list(self._fleet.servers)

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
        if not spec.cap.is_fixed:
            raise ConfigurationError(
                f"flow.cap={spec.cap} follows how full the KV cache is, which servers do not tell "
                "with their responses; set flow.cap to a number"
            )
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
        timeouts = Timeouts(self.connect_timeout_s, self.stall_timeout_s, self.sync_timeout_s)
        self._fleet = Fleet(self.urls, timeouts, spec, self.sync_directory)
        try:
            facts = await self._fleet.admit()
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
                fleet, started = self._running(), self.version
                server = fleet.idlest()
                pieces = server.generate(self._body(request, tokens))
            try:
                async with aclosing(pieces):
                    async for piece in pieces:
                        tokens += piece.token_ids
                        if piece.reason == "abort" and endings == self._gate.endings:
                            raise LostError(f"{server.url} ended a response by itself")
                        ending = ENDINGS[piece.reason]
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
                fleet.lose(server, error)
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
        fleet = self._running()
        await self._gate.shut(keep=keep)
        self._keeps = keep
        # A sync may take servers back, even if none is left now.
        await fleet.each(lambda server: server.hold(keep=keep))

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        """Let all servers generate. See :class:`Engine`."""
        await self._running().on_all(lambda server: server.release(version, clear_kv=clear_kv))
        self._keeps = False
        self._gate.open(version, clear_kv=clear_kv)

    def load(self) -> Load | None:
        """Counted here, over the servers in use."""
        return None if self._fleet is None else self._fleet.load()

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """Log-probs of the model's own distribution by the servers' prefill. They take turns, so
        that each is probed sooner or later. See :class:`Engine`."""
        fleet = self._running()

        async def one(tokens: Sequence[int]) -> list[float]:
            while True:
                server = fleet.next()
                try:
                    return await server.score(tokens)
                except (LostError, RefusedError) as error:
                    fleet.lose(server, error)

        if self._keeps:  # as in VLLMEngine
            await fleet.on_all(lambda server: server.release(self._gate.label, clear_kv=False))
        try:
            return await all_of(one(tokens) for tokens in sequences)
        finally:
            if self._keeps:
                await fleet.on_all(lambda server: server.hold(keep=True))

    # -- weights: see :class:`copris_lightning.weights.transport.Receiver` -------------------

    def transport(self, rank: int, run: Run) -> Transport:
        """Through files that the servers see. See :class:`Engine`."""
        return FilesTransport(self, self.sync_directory, rank, run)

    async def begin_load(self) -> None:
        """Take back the servers that were lost and answer again, and get all ready."""
        self._gate.renew()
        await self._running().readmit()
        await self._running().on_all(lambda server: server.load("begin_shards"))

    async def load_shard(self, path: Path) -> None:
        """Have all servers load a file."""
        await self._running().on_all(lambda server: server.load("load_shard", str(path)))

    async def end_load(self) -> None:
        """Have them say what arrived.

        Raises:
            WeightSyncError: not what was sent.
        """
        await self._running().on_all(lambda server: server.end_load())

    async def load_adapter(self, folder: Path) -> None:
        """Refused by :meth:`validate` already."""
        raise WeightSyncError("servers take whole weights only")

    async def explain(self, paths: Sequence[Path]) -> str:
        """Ask every server which tensors differ."""
        answers: list[str] = []

        async def one(server: VLLMServer) -> None:
            answers.append(f"{server.url}: {await server.explain([str(p) for p in paths])}")

        await self._running().on_all(one)
        return "; ".join(sorted(answers))

    def kill(self) -> None:
        """There is nothing of theirs to end here."""

    async def close(self) -> None:
        """Close the connections; the servers go on."""
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            await fleet.close()

    def _running(self) -> Fleet:
        if self._fleet is None:
            raise EngineError("the servers have not been contacted: the engine is not running")
        return self._fleet
