"""A vLLM server that is wrong, or goes wrong, as it is told to: played by a small HTTP server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

from copris_lightning.engines.engine import Chunk, Decoding, EngineSpec, GenerationRequest
from copris_lightning.engines.server import VLLMServerEngine

SPEC = EngineSpec("some/model", 16, 100, vocab_size=98)
GENERATE = "/inference/v1/generate"
Part = tuple[list[int], str | None] | str | float


@dataclass
class Fake:
    """Answers like a vLLM server, as far as it is told to.

    Attributes:
        parts: what it streams to each request, one after another: tokens and finish reason, an
            error event as text, ``"cut"`` to drop the connection, or seconds to wait. Every
            token's log-prob is minus the token.
        silent: its engine dies when it is to load weights, and the call is never answered.
        broken: routes that answer with an error, and its status.
        requests: bodies of the requests to generate.
        arrival: what it says of a load.
    """

    model: str = "some/model"
    max_model_len: int = 100
    logprobs_mode: str = "processed_logprobs"
    sees_file: bool = True
    key: str | None = None
    silent: bool = False
    parts: list[list[Part]] = field(default_factory=list)
    broken: dict[str, int] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    arrival: Any = field(default_factory=lambda: {"stale": [], "missing": [], "unused": []})
    url: str = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        route = request.path
        body = await request.json() if request.can_read_body else {}
        self.calls.append(body.get("method", route))
        status = self.broken.get(body.get("method", route))
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            status = 401
        if status is not None:
            text = json.dumps({"error": {"message": "as it was told to"}})
            return web.Response(status=status, text=text)
        if self.silent and body.get("method") == "load_shard":
            self.broken["/health"] = 503
            await asyncio.Event().wait()
        if route == GENERATE and body.get("stream"):
            return await self._stream(request, body)
        tokens = body.get("token_ids", [])
        card = {"id": "x", "root": self.model, "max_model_len": self.max_model_len}
        facts = {"logprobs_mode": self.logprobs_mode, "sees_file": self.sees_file}
        results = {
            "describe": {**facts, "max_num_seqs": 16},
            "end_shards": self.arrival,
            "explain_mismatch": "all is well",
        }
        answers: dict[str, Any] = {
            "/v1/models": {"data": [card]},
            "/collective_rpc": {"results": [results.get(body.get("method", ""))]},
            "/reset_prefix_cache": {"success": True},
            GENERATE: {"prompt_logprobs": [{str(t): {"logprob": -float(t)}} for t in tokens]},
        }
        return web.json_response(answers.get(route, {}))

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.requests.append(body)
        response = web.StreamResponse()
        await response.prepare(request)
        for part in self.parts.pop(0):
            if part == "cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            if isinstance(part, float):
                await asyncio.sleep(part)
                continue
            event: dict[str, Any] = {"error": {"code": 500, "message": part}}
            if not isinstance(part, str):
                tokens, reason = part
                content = [{"token_id": t, "logprob": -float(t)} for t in tokens]
                choice = {"token_ids": tokens, "finish_reason": reason}
                event = {"choices": [{**choice, "logprobs": {"content": content}}]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.01)
        await response.write(b"data: [DONE]\n\n")
        return response


def run(
    fakes: list[Fake],
    work: Callable[[VLLMServerEngine], Coroutine[Any, Any, Any]],
    **settings: Any,
) -> Any:
    """Start an engine on the fakes, do the work, and close all."""

    async def play() -> Any:
        servers = []
        for fake in fakes:
            app = web.Application()
            app.router.add_route("*", "/{route:.*}", fake.answer)
            servers.append(TestServer(app, host="127.0.0.1"))
            await servers[-1].start_server()
            fake.url = str(servers[-1].make_url("")).rstrip("/")
        engine = VLLMServerEngine([fake.url for fake in fakes], connect_timeout_s=2.0, **settings)
        try:
            await engine.start(SPEC)
            await engine.release(0)
            return await work(engine)
        finally:
            await engine.close()
            for server in servers:
                await server.close()

    return asyncio.run(play())


async def nothing(engine: VLLMServerEngine) -> None:
    """No work."""


async def generate(engine: VLLMServerEngine) -> list[Chunk]:
    """One response of at most ten tokens, which 1 ends."""
    request = GenerationRequest("name", (3, 4), 10, Decoding(stop_token_ids=(1,)), seed=5)
    return [chunk async for chunk in engine.stream(request)]
