"""HTTP with one server: a question and its JSON, or the events that it streams.

Everything here raises :class:`LostError` when the server does not answer (in time), and
:class:`RefusedError` when it answers with an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import aiohttp

from copris_lightning.errors import EngineError


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


class ServerHTTP:
    """Asks one server, and listens to it.

    Args:
        url: without a slash at its end.
        session: opens the connections; its own limits must not be tighter than ``timeouts``.
        timeouts: how long to wait.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, timeouts: Timeouts) -> None:
        self.url = url
        self.timeouts = timeouts
        self._rests = False
        self._session = session
        self._listening = 0
        self._heard = 0.0

    def rest(self, rests: bool) -> None:
        """The server was told to send nothing, or no longer."""
        self._rests = rests
        self._heard = asyncio.get_running_loop().time()

    async def ask(
        self,
        method: str,
        route: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """The JSON that a request is answered with, or ``None`` for an empty answer.

        Args:
            method: of HTTP.
            route: begins with a slash.
            body: is sent as JSON.
            timeout_s: for the whole answer; ``timeouts.connect_s`` by default.
        """
        timeout_s = timeout_s or self.timeouts.connect_s
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.request(method, self.url + route, json=body) as response,
            ):
                text = await response.text()
        except aiohttp.ClientError as error:
            raise self._lost(error) from error
        except TimeoutError as error:
            raise LostError(f"{self.url} did not answer {route} in {timeout_s:g} s") from error
        if response.status >= 400:
            raise self._refused(response.status, text)
        return json.loads(text) if text else None

    async def events(self, route: str, body: dict[str, Any]) -> AsyncGenerator[Any, None]:
        """The JSON of each server-sent event that a request is answered with.

        Closing the generator closes the connection. An event may take as long as it takes while
        the server sends anything, here or on another connection.

        Args:
            route: begins with a slash.
            body: is posted as JSON.
        """
        if not self._listening:
            self._heard = asyncio.get_running_loop().time()
        self._listening += 1
        try:
            async with asyncio.timeout(self.timeouts.stall_s):
                response = await self._session.post(self.url + route, json=body)
            try:
                if response.status >= 400:
                    async with asyncio.timeout(self.timeouts.connect_s):
                        raise self._refused(response.status, await response.text())
                rest = b""
                while data := await self._read(response.content):
                    *events, rest = (rest + data).split(b"\n\n")
                    for event in events:
                        if event == b"data: [DONE]":
                            return
                        yield self._checked(json.loads(event.removeprefix(b"data: ")))
            finally:
                response.close()
        except aiohttp.ClientError as error:
            raise self._lost(error) from error
        except TimeoutError as error:
            raise LostError(f"{self.url} was silent for {self.timeouts.stall_s:g} s") from error
        finally:
            self._listening -= 1

    async def _read(self, content: aiohttp.StreamReader) -> bytes:
        """The next bytes of a response.

        Raises:
            TimeoutError: the server has been silent on all of them.
        """
        loop = asyncio.get_running_loop()
        while True:
            if self._rests:
                self._heard = loop.time()
            try:
                async with asyncio.timeout_at(self._heard + self.timeouts.stall_s):
                    data = await content.readany()  # loses nothing when cancelled
            except TimeoutError:
                if not self._rests and loop.time() >= self._heard + self.timeouts.stall_s:
                    raise
            else:
                self._heard = loop.time()
                return data

    def _checked(self, event: dict[str, Any]) -> dict[str, Any]:
        """An event, unless it is an error."""
        if "error" in event:
            raise self._refused(event["error"]["code"], event["error"]["message"])
        return event

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
