"""One vLLM server, spoken to over HTTP: tokens in and out, and its weights."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp

from copris_lightning.core.outcome import FinishReason
from copris_lightning.core.sampling import Sampling
from copris_lightning.errors import EngineError, WeightSyncError
from copris_lightning.weights.arrival import fault

T = TypeVar("T")

_GENERATE = "/inference/v1/generate"
_LOOK_EVERY_S = 2.0
"""How often to ask, during a call to its engine, whether a server is well, in seconds."""
_LEAST_LOGPROB = -9999.0
"""What a server sends for log-probs that JSON cannot hold."""


class LostError(EngineError):
    """A server does not answer any more."""


class RefusedError(EngineError):
    """A server answered with an error.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for a server, in seconds.

    Attributes:
        connect_s: for a connection, and for answers that take no work.
        stall_s: for anything at all, while it has work.
        sync_s: for it to load weights.
    """

    connect_s: float
    stall_s: float
    sync_s: float


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """How a server was started.

    Attributes:
        models: names and paths of what it serves.
        max_model_len: longest sequence, in tokens.
        max_num_seqs: responses that it generates at once (of each data-parallel rank).
        logprobs_mode: vLLM's setting.
        sees_file: whether the file that it was asked about exists there.
    """

    models: frozenset[str]
    max_model_len: int
    max_num_seqs: int
    logprobs_mode: str
    sees_file: bool


class VLLMServer:
    """A client of one server that was started with `copris serve`.

    Every method raises :class:`LostError` when the server does not answer (in time), and
    :class:`RefusedError` when it answers with an error.

    Args:
        url: without a slash at its end.
        http: opens the connections; its own limits must not be tighter than ``timeouts``.
        timeouts: how long to wait.

    Attributes:
        lost: why it is not in use; ``None`` while it is.
        in_flight: responses that it is generating.
    """

    def __init__(self, url: str, http: aiohttp.ClientSession, timeouts: Timeouts) -> None:
        self.url = url
        self.lost: str | None = "not contacted yet"
        self.in_flight = 0
        self._http = http
        self._timeouts = timeouts
        self._heard = 0.0

    async def facts(self, path: Path) -> ServerFacts:
        """How it was started, and whether it sees a file; also sees to it that it generates."""
        cards = (await self._ask("GET", "/v1/models"))["data"]
        workers = await self._rpc("describe", path, self._timeouts.connect_s)
        # A trainer that was killed within a sync has left it paused.
        await self._ask("POST", "/resume")
        await self.score((0, 0))
        return ServerFacts(
            models=frozenset(name for card in cards for name in (card["id"], card["root"])),
            max_model_len=cards[0]["max_model_len"],
            max_num_seqs=workers[0]["max_num_seqs"],
            logprobs_mode=workers[0]["logprobs_mode"],
            sees_file=all(worker["sees_file"] for worker in workers),
        )

    # -- generating ------------------------------------------------------------------------

    async def generate(
        self, token_ids: Sequence[int], params: dict[str, Any], request_id: str
    ) -> AsyncGenerator[
        tuple[tuple[int, ...], tuple[float, ...] | None, FinishReason | None], None
    ]:
        """Stream a response; closing the generator aborts it.

        Args:
            token_ids: the prompt.
            params: vLLM's sampling parameters.
            request_id: for the server's log.

        Yields:
            new token ids, their log-probs (NaN where there is none; ``None`` if ``params`` ask
            for none) and the finish reason, which only the last has.
        """
        body = {
            "request_id": request_id,
            "token_ids": token_ids,
            "sampling_params": {**params, "detokenize": False},
            "stream": True,
        }
        if not self.in_flight:
            self._heard = asyncio.get_running_loop().time()
        self.in_flight += 1
        try:
            async with aclosing(self._events(body)) as events:
                async for event in events:
                    if "error" in event:
                        raise self._refused(event["error"]["code"], event["error"]["message"])
                    choice = event["choices"][0]
                    reason: FinishReason | Literal["abort"] | None = choice["finish_reason"]
                    if reason == "abort":
                        raise LostError(f"{self.url} ended request {request_id} by itself")
                    logprobs = None
                    if params["logprobs"] is not None:
                        logprobs = tuple(map(_logprob, choice["logprobs"]["content"]))
                    yield tuple(choice["token_ids"]), logprobs, reason
                    if reason is not None:
                        return
            raise LostError(f"{self.url} closed the connection within a response")
        finally:
            self.in_flight -= 1

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs under the model's own distribution of the tokens after the first."""
        params = {
            **Sampling().distribution,
            "max_tokens": 1,
            "prompt_logprobs": 0,
            "detokenize": False,
            "skip_reading_prefix_cache": True,
        }
        body = {"token_ids": token_ids, "sampling_params": params}
        answer = await self._ask("POST", _GENERATE, body, timeout_s=self._timeouts.stall_s)
        entries = answer["prompt_logprobs"]
        return [_logprob(entries[i][str(token_ids[i])]) for i in range(1, len(token_ids))]

    # -- weights ---------------------------------------------------------------------------

    async def load(self, path: Path) -> None:
        """Replace the weights by those of a safetensors file.

        Raises:
            WeightSyncError: it answers, but did not load them.
        """
        try:
            # Requests given up a moment ago may still be running there: pausing ends them, and
            # drops all prefixes computed with the old weights.
            await self._ask("POST", "/pause?mode=abort", timeout_s=self._timeouts.stall_s)
            try:
                found = fault(await self._rpc("load_trainer_weights", path, self._timeouts.sync_s))
            except LostError:
                raise  # there is nobody to resume
            except BaseException:
                await self._ask("POST", "/resume")
                raise
            await self._ask("POST", "/resume")
        except RefusedError as error:
            if not await self._lives():
                raise LostError(f"{self.url}: its engine died ({error})") from error
            raise WeightSyncError(f"{self.url} could not load the weights: {error}") from error
        if found is not None:
            raise WeightSyncError(f"the weights did not arrive at {self.url}: {found}")

    async def explain_mismatch(self, path: Path) -> str:
        """Which parts of its model do not compute with the weights of a safetensors file."""
        answers = await self._rpc("explain_mismatch", path, self._timeouts.sync_s)
        return "; ".join(dict.fromkeys(answers))

    async def _lives(self) -> bool:
        """Whether it says that its engine lives; one that takes its time is given it."""
        try:
            await self._ask("GET", "/health")
        except RefusedError:
            return False
        except LostError as error:
            return isinstance(error.__cause__, TimeoutError)
        return True

    async def _while_it_lives(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a call to the engine, which is never answered if the engine dies.

        A server whose engine died says so, closes its port, and waits for its open calls to end.
        """
        task, looks = asyncio.create_task(work), 0
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_EVERY_S)
                if task.done():
                    break
                looks = 0 if await self._lives() else looks + 1
                if looks == 2:
                    raise LostError(f"{self.url}: its engine died while it was called")
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # seen

    # -- HTTP ------------------------------------------------------------------------------

    async def _rpc(self, method: str, path: Path, timeout_s: float) -> list[Any]:
        """Each worker's result of a method of the worker extension."""
        body = {"method": method, "args": [str(path)]}
        answer = await self._while_it_lives(
            self._ask("POST", "/collective_rpc", body, timeout_s=timeout_s)
        )
        results: list[Any] = answer["results"]
        return results

    async def _ask(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """The JSON that a request is answered with, or ``None`` for an empty answer."""
        timeout_s = timeout_s or self._timeouts.connect_s
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._http.request(method, self.url + route, json=body) as response,
            ):
                text = await response.text()
        except aiohttp.ClientError as error:
            raise self._lost(error) from error
        except TimeoutError as error:
            raise LostError(f"{self.url} did not answer {route} in {timeout_s:g} s") from error
        if response.status >= 400:
            raise self._refused(response.status, text)
        return json.loads(text) if text else None

    async def _events(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The server-sent events of a response. Leaving closes the connection: that aborts it."""
        try:
            async with asyncio.timeout(self._timeouts.stall_s):
                response = await self._http.post(self.url + _GENERATE, json=body)
            try:
                if response.status >= 400:
                    async with asyncio.timeout(self._timeouts.connect_s):
                        raise self._refused(response.status, await response.text())
                rest = b""
                while data := await self._read(response.content):
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        if event == b"data: [DONE]":
                            return
                        yield json.loads(event.removeprefix(b"data: "))
            finally:
                response.close()
        except aiohttp.ClientError as error:
            raise self._lost(error) from error
        except TimeoutError as error:
            raise LostError(f"{self.url} was silent for {self._timeouts.stall_s:g} s") from error

    async def _read(self, content: aiohttp.StreamReader) -> bytes:
        """The next bytes of a response, however long that takes while the server sends others.

        Raises:
            TimeoutError: it has been silent on all of them.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout_at(self._heard + self._timeouts.stall_s):
                    data = await content.readany()  # loses nothing when cancelled
            except TimeoutError:
                if loop.time() >= self._heard + self._timeouts.stall_s:
                    raise
            else:
                self._heard = loop.time()
                return data

    def _refused(self, status: int, message: str) -> RefusedError:
        return RefusedError(status, f"{self.url} answers {status}: {_plain(message)}")

    def _lost(self, error: aiohttp.ClientError) -> LostError:
        return LostError(f"{self.url}: {str(error) or type(error).__name__}")


def _plain(message: str) -> str:
    """An error's own words, without the JSON that vLLM puts around them."""
    try:
        return str(json.loads(message)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return message


def _logprob(entry: dict[str, Any]) -> float:
    value = float(entry["logprob"])
    return value if value > _LEAST_LOGPROB else math.nan
