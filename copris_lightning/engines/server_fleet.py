"""The servers of a run: which are in use, and why the others are not."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from copris_lightning.core.cap import Load
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.engines.server_client import ServerFacts, VLLMServer
from copris_lightning.engines.server_http import LostError, RefusedError, ServerHTTP, Timeouts
from copris_lightning.errors import ConfigurationError, EngineError
from copris_lightning.weights.files import hand_over_prefix

T = TypeVar("T")

API_KEY_VARIABLE = "VLLM_API_KEY"
"""Holds the servers' key, if they ask for one; vLLM's servers read it from there, too."""

_log = logging.getLogger(__name__)


class Fleet:
    """Made on a running event loop, and used on it. No server is in use before it was admitted.

    Args:
        urls: of the servers, without a slash at their ends.
        timeouts: how long to wait for one.
        spec: what each has to be good for.
        sync_directory: where weights are handed over, which each must see; ``None`` is shared
            memory.

    Attributes:
        servers: all of them, in the order of the URLs.
    """

    def __init__(
        self, urls: Iterable[str], timeouts: Timeouts, spec: EngineSpec, sync_directory: str | None
    ) -> None:
        key = os.environ.get(API_KEY_VARIABLE)
        self._session = aiohttp.ClientSession(
            # A connection per request: one kept open may be closed just as it is used again.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, connect=timeouts.connect_s),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        self.servers = [VLLMServer(ServerHTTP(url, self._session, timeouts)) for url in urls]
        self._spec = spec
        self._sync_directory = sync_directory
        self._turn = itertools.count()

    async def close(self) -> None:
        """Close the connections; the servers go on."""
        await self._session.close()

    # -- who is in use ---------------------------------------------------------------------

    @property
    def in_use(self) -> list[VLLMServer]:
        """The servers in use; may be none."""
        return [server for server in self.servers if server.lost is None]

    def live(self) -> list[VLLMServer]:
        """The servers in use: at least one.

        Raises:
            EngineError: none is; says why of each.
        """
        live = self.in_use
        if not live:
            urls = [server.url for server in self.servers]
            reasons = "; ".join(server.lost or "" for server in self.servers)
            raise EngineError(f"no server of engine.urls={urls} is left: {reasons}")
        return live

    def idlest(self) -> VLLMServer:
        """The server with the fewest responses in flight."""
        return min(self.live(), key=lambda server: server.in_flight)

    def next(self) -> VLLMServer:
        """Each in its turn, so that all are asked sooner or later."""
        live = self.live()
        return live[next(self._turn) % len(live)]

    def load(self) -> Load:
        """Responses in flight on the servers in use, as counted here."""
        running = sum(min(server.in_flight, server.max_num_seqs) for server in self.in_use)
        return Load(running, sum(server.in_flight for server in self.in_use) - running)

    # -- asking them -----------------------------------------------------------------------

    async def each(self, work: Callable[[VLLMServer], Awaitable[Any]]) -> None:
        """Do something on all servers in use; those that fail are lost."""

        async def one(server: VLLMServer) -> None:
            try:
                await work(server)
            except (LostError, RefusedError) as error:
                self.lose(server, error)

        await all_of(one(server) for server in self.in_use)

    async def on_all(self, work: Callable[[VLLMServer], Awaitable[Any]]) -> None:
        """The same; at least one must live through it.

        Raises:
            EngineError: none did.
        """
        self.live()
        await self.each(work)
        self.live()

    def lose(self, server: VLLMServer, error: LostError | RefusedError) -> None:
        """Go on without a server that is gone, or broken.

        Raises:
            RefusedError: the error itself, where it is the request's own fault.
        """
        if isinstance(error, RefusedError) and error.status < 500:
            raise error
        if server.lost is None:
            server.lost = str(error)
            _log.warning(f"going on without a server: {error}")

    # -- they come and go ------------------------------------------------------------------

    async def admit(self) -> list[ServerFacts]:
        """Contact every server, check that it is what the run needs, and take it into use.

        Raises:
            ConfigurationError: names the server, what is wrong with it and what to do.
        """
        return await all_of(self._admit(server) for server in self.servers)

    async def readmit(self) -> None:
        """Take back those that were lost and answer again; they have old weights."""

        async def one(server: VLLMServer) -> None:
            try:
                await self._admit(server)
            except ConfigurationError as error:
                server.lost = str(error)
            else:
                _log.warning(f"{server.url} is back")

        await all_of(one(server) for server in self.servers if server.lost is not None)

    async def _admit(self, server: VLLMServer) -> ServerFacts:
        name = f"urls: {server.url}"
        parent, prefix = os.path.split(hand_over_prefix(self._sync_directory))
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
                f"sync_directory={self._sync_directory!r}: {server.url} does not see {file.name}, "
                "which was just written; name a directory that trainer and servers share"
            )
        problem = _problem(facts, self._spec)
        if problem is not None:
            raise ConfigurationError(f"{name} {problem}; {start}")
        server.lost = None
        return facts


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


async def all_of(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all, once the last has ended; raises the first error if there is one."""
    results: list[Any] = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
