"""Rewards for tests. Worker processes import this file, so it imports nothing heavy."""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any


def parity(response: str, prompt: Any) -> float:
    """Varies on random text, and costs nothing."""
    return float(len(response) % 2)


class Parity:
    """The same as a class, for configs."""

    def __call__(self, response: str, prompt: Any) -> float:
        return parity(response, prompt)


async def by_answer(response: str, prompt: Any) -> float:
    """Depends on which prompt's answer it is given; answers end with a number."""
    return float((len(response) + int(str(prompt.answer).split()[-1])) % 3)


async def another(response: str, prompt: Any) -> float:
    """Right where the other is wrong."""
    return 1.0 - await by_answer(response, prompt)


class ShareOfDigits:
    """Varies on random text: the share of digits in the response."""

    def __call__(self, response: str, prompt: Any) -> float:
        return sum(c.isdigit() for c in response) / max(1, len(response))


class FailingReward:
    """Works for a while (each worker counts its own calls), then raises."""

    def __init__(self, after: int = 0) -> None:
        self.after = after
        self.calls = 0

    def __call__(self, response: str, prompt: Any) -> float:
        self.calls += 1
        if self.calls > self.after:
            raise KeyError("the answer is missing")
        return 0.0


async def failing(response: str, prompt: Any) -> float:
    raise KeyError("the answer is missing")


def slow(response: str, prompt: Any) -> float:
    time.sleep(0.3)
    return 0.0


class SlowFirst:
    """Takes its time on its first call."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, response: str, prompt: Any) -> float:
        time.sleep(self.seconds)
        self.seconds = 0.0
        return parity(response, prompt)


def no_verdict(response: str, prompt: Any) -> None:
    return None


def no_verdict_sometimes(response: str, prompt: Any) -> Any:
    if len(response) % 5 == 0:
        return None
    return math.nan if len(response) % 7 == 0 else parity(response, prompt)


def constant(response: str, prompt: Any) -> float:
    return 0.5


class Restless:
    """Takes a random time, in real seconds; another one in each process and each run."""

    def __init__(self, mean_s: float = 0.004) -> None:
        self.mean_s = mean_s

    def __call__(self, response: str, prompt: Any) -> float:
        time.sleep(int.from_bytes(os.urandom(2), "big") / 2**15 * self.mean_s)
        return parity(response, prompt)


class RestlessJudge(Restless):
    """The same behind a network."""

    async def __call__(self, response: str, prompt: Any) -> float:  # type: ignore[override]  # may be async
        await asyncio.sleep(int.from_bytes(os.urandom(2), "big") / 2**15 * self.mean_s)
        return parity(response, prompt)


class Alarmed:
    """Limits itself by ``signal.alarm``, as verifiers do: on a main thread, or not at all."""

    def __call__(self, response: str, prompt: Any) -> float:
        def late(number: int, frame: Any) -> None:
            raise TimeoutError("the verifier took too long")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(60)
        except TimeoutError:
            return 0.25
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return 0.0


class AlarmedJudge(Alarmed):
    """The same, ``async``."""

    async def __call__(self, response: str, prompt: Any) -> float:  # type: ignore[override]  # may be async
        return super().__call__(response, prompt)


class DoesWhatItIsTold:
    """Does what the response says."""

    def __call__(self, response: str, prompt: Any) -> Any:
        what, _, rest = response.partition(" ")
        if what == "pid":
            return os.getpid()
        if what == "prompt":
            return float(prompt.id == "sum-7" and prompt.answer == "7" and prompt.extra["level"])
        if what == "raise":
            raise eval(rest)
        if what == "hang":
            time.sleep(3600)
        if what == "exit":
            os._exit(9)
        if what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "signals":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            return 1.0
        if what == "fork":
            child = os.fork()
            if child == 0:
                time.sleep(3600)
            Path(rest).write_text(str(child))
            time.sleep(3600)
        return eval(rest) if what == "value" else len(response)


class Judge:
    """Does what the response says, on an event loop."""

    def __init__(self) -> None:
        self.session: Any = None
        self.cancelled = 0

    async def __call__(self, response: str, prompt: Any) -> Any:
        what, _, rest = response.partition(" ")
        if what == "session":
            # As an HTTP session: made on the first call, bound to the loop that runs then.
            self.session = self.session or asyncio.get_running_loop()
            return float(self.session is asyncio.get_running_loop())
        if what == "pid":
            return os.getpid()
        if what == "cancelled":
            return self.cancelled
        if what == "sleep":
            try:
                await asyncio.sleep(float(rest))
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if what == "block":
            time.sleep(3600)  # noqa: ASYNC251 - as rewards do that were not written for a loop
        if what == "stubborn":
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    continue
        if what == "raise":
            raise eval(rest)
        if what == "exit":
            os._exit(9)
        return eval(rest) if what == "value" else 0.5

    async def method(self, response: str, prompt: Any) -> float:
        return 0.25


async def judged(response: str, prompt: Any, bonus: float = 0.0) -> float:
    return 0.25 + bonus


class TwoArguments(Exception):
    """Can be pickled, but not unpickled: as many exceptions of many libraries."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left} is not {right}")


class Unloadable:
    """Its copy in a worker raises what it is told."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["what"] == "exit":
            os._exit(9)
        if state["what"] == "hang":
            time.sleep(3600)
        raise eval(state["what"])

    def __call__(self, response: str, prompt: Any) -> float:
        return 1.0


class WritesDown:
    """Varies on random text, and keeps what it was called with in a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, response: str, prompt: Any) -> float:
        with open(self.path, "ab") as file:
            pickle.dump((response, prompt), file)
        return parity(response, prompt)

    def prompts(self) -> list[Any]:
        """In the order of the calls."""
        return [prompt for _, prompt in self._calls()]

    def texts(self) -> list[str]:
        """The responses, in the order of the calls."""
        return [response for response, _ in self._calls()]

    def _calls(self) -> list[tuple[str, Any]]:
        found = []
        if os.path.exists(self.path):
            with open(self.path, "rb") as file:
                while file.peek():
                    found.append(pickle.load(file))
        return found
