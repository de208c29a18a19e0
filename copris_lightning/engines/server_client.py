"""One vLLM server, spoken to over HTTP: tokens in and out, and its weights."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from copris_lightning.core.sampling import Sampling
from copris_lightning.engines.server_http import LostError, RefusedError, ServerHTTP
from copris_lightning.errors import EngineError, WeightSyncError
from copris_lightning.weights.arrival import fault

T = TypeVar("T")

_GENERATE = "/inference/v1/generate"
_LOOK_EVERY_S = 2.0
"""How often to ask, during a call to its engine, whether a server is well, in seconds."""
_ON_THE_WAY_S = 0.1
"""How long responses may take to end, once the server has ended them, in seconds."""
_LEAST_LOGPROB = -9999.0
"""What a server sends for log-probs that JSON cannot hold."""


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


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a response.

    Attributes:
        token_ids: new ones.
        logprobs: theirs, NaN where there is none; ``None`` if none were asked for.
        reason: on the last, vLLM's finish reason: ``stop``, ``length`` or ``abort``.
        made: on the last, (length, version) of each run of all tokens.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    reason: str | None
    made: tuple[tuple[int, int], ...]


class VLLMServer:
    """A client of one server that was started with `copris serve`.

    Every method raises :class:`LostError` when the server does not answer (in time), and
    :class:`RefusedError` when it answers with an error.

    Args:
        http: reaches it.

    Attributes:
        url: its own.
        lost: why it is not in use; ``None`` while it is.
        max_num_seqs: responses that it generates at once; 0 before it was asked.
    """

    def __init__(self, http: ServerHTTP) -> None:
        self.url = http.url
        self.lost: str | None = "not contacted yet"
        self.max_num_seqs = 0
        self._http = http
        self._reading: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """Responses that it is generating."""
        return len(self._reading)

    async def facts(self, path: str) -> ServerFacts:
        """How it was started, and whether it sees a file; also sees to it that it generates."""
        cards = (await self._http.ask("GET", "/v1/models"))["data"]
        workers = await self.rpc("describe", path)
        # A trainer that was killed may have left it paused, or with requests.
        await self._pause(keep=False)
        await self._http.ask("POST", "/resume")
        await self.score((0, 0))
        self.max_num_seqs = workers[0]["max_num_seqs"]
        return ServerFacts(
            models=frozenset(name for card in cards for name in (card["id"], card["root"])),
            max_model_len=cards[0]["max_model_len"],
            max_num_seqs=workers[0]["max_num_seqs"],
            logprobs_mode=workers[0]["logprobs_mode"],
            sees_file=all(worker["sees_file"] for worker in workers),
        )

    # -- generating ------------------------------------------------------------------------

    def generate(self, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """Stream a response, which begins at once; closing the generator aborts it.

        It is read whether or not anybody reads here, so that :meth:`hold` sees its end.

        Args:
            body: of the request: ``request_id`` (for the server's log), ``token_ids``,
                ``sampling_params``, ``cache_salt``.
        """
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        reading = asyncio.create_task(self._read_into(pieces, body))
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        return self._pieces(pieces, reading)

    @staticmethod
    async def _pieces(
        pieces: asyncio.Queue[Piece | Exception], reading: asyncio.Task[None]
    ) -> AsyncGenerator[Piece, None]:
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.reason is not None:
                    return
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read_into(
        self, pieces: asyncio.Queue[Piece | Exception], body: dict[str, Any]
    ) -> None:
        try:
            events = self._http.events(_GENERATE, {**body, "stream": True})
            async with aclosing(events):
                async for event in events:
                    piece = _piece(event["choices"][0])
                    pieces.put_nowait(piece)
                    if piece.reason is not None:
                        return
            raise LostError(f"{self.url} closed the connection within a response")
        except Exception as error:  # noqa: BLE001 - raised to whoever reads
            pieces.put_nowait(error)

    async def hold(self, *, keep: bool) -> None:
        """Stop generating; without ``keep`` all responses end, with all their tokens."""
        await self._pause(keep=keep)
        if keep:
            return
        while self._reading:
            _, left = await asyncio.wait(set(self._reading), timeout=_ON_THE_WAY_S)
            if left:  # one was still on its way there
                await self._pause(keep=False)
        await self._http.ask("POST", "/resume")

    async def release(self, version: int, *, clear_kv: bool) -> None:
        """Generate, under a version."""
        body = {"new_version": str(version)}
        await self._http.ask("POST", "/update_weight_version", body)
        self._http.rest(False)
        if clear_kv:
            answer = await self._http.ask("POST", "/reset_prefix_cache?reset_running_requests=true")
            if not answer["success"]:
                raise EngineError(f"{self.url} did not drop the prefixes of the old weights")
        await self._http.ask("POST", "/resume")

    async def _pause(self, *, keep: bool) -> None:
        route = f"/pause?mode={'keep' if keep else 'abort'}&clear_cache=false"
        await self._http.ask("POST", route, timeout_s=self._http.timeouts.stall_s)
        self._http.rest(keep)

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
        answer = await self._http.ask(
            "POST", _GENERATE, body, timeout_s=self._http.timeouts.stall_s
        )
        entries = answer["prompt_logprobs"]
        return [_logprob(entries[i][str(token_ids[i])]) for i in range(1, len(token_ids))]

    # -- weights ---------------------------------------------------------------------------

    async def load(self, method: str, *args: Any) -> list[Any]:
        """Have its workers do something with new weights.

        Raises:
            WeightSyncError: it answers, but could not.
        """
        try:
            return await self.rpc(method, *args, timeout_s=self._http.timeouts.sync_s)
        except RefusedError as error:
            if not await self._lives():
                raise LostError(f"{self.url}: its engine died ({error})") from error
            raise WeightSyncError(f"{self.url} could not load the weights: {error}") from error

    async def end_load(self) -> None:
        """All files were loaded.

        Raises:
            WeightSyncError: it does not compute with what they held.
        """
        found = fault(await self.load("end_shards"))
        if found is not None:
            raise WeightSyncError(f"the weights did not arrive at {self.url}: {found}")

    async def explain(self, paths: Sequence[str]) -> str:
        """Which parts of its model do not compute with the weights of these files."""
        answers = await self.rpc("explain_mismatch", paths, timeout_s=self._http.timeouts.sync_s)
        return "; ".join(dict.fromkeys(answers))

    async def _lives(self) -> bool:
        """Whether it says that its engine lives; one that takes its time is given it."""
        try:
            await self._http.ask("GET", "/health")
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

    async def rpc(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        """Each worker's result of a method of the worker extension."""
        body = {"method": method, "args": args}
        answer = await self._while_it_lives(
            self._http.ask("POST", "/collective_rpc", body, timeout_s=timeout_s)
        )
        results: list[Any] = answer["results"]
        return results


def _piece(choice: dict[str, Any]) -> Piece:
    given = choice.get("logprobs")
    spans = choice.get("weight_versions") or ()
    return Piece(
        token_ids=tuple(choice["token_ids"]),
        logprobs=None if given is None else tuple(map(_logprob, given["content"])),
        reason=choice["finish_reason"],
        made=tuple((span["end"] - span["start"], int(span["version"])) for span in spans),
    )


def _logprob(entry: dict[str, Any]) -> float:
    value = float(entry["logprob"])
    return value if value > _LEAST_LOGPROB else math.nan
