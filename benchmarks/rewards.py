"""How long a verdict takes while the event loop's thread is busy reading tokens.

    python benchmarks/rewards.py [--busy 0.75] [--workers 1]

A client of an engine holds Python's lock for most of the time (0.75 of it at 5,500 tokens/s with
log-probs), and whoever else wants the lock waits up to 5 ms for it, each time. Printed are a burst
of calls at once, and a steady stream of them: calls/s, and the time from call to verdict.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

BURST = 136
STEP_S, OUTPUT_S = 0.02, 0.0005
"""How often the engine sends, and how long the loop's thread reads the output of one request."""


def quick(response: str, prompt: Any) -> float:
    """Takes 0.3 ms."""
    until = time.perf_counter() + 0.0003
    while time.perf_counter() < until:
        pass
    return float(len(response) % 2)


def uneven(response: str, prompt: Any) -> float:
    """Takes 0.3 ms, and 200 ms one time in fifty."""
    time.sleep(0.2 if len(response) % 50 == 0 else 0.0003)
    return 0.0


async def judged(response: str, prompt: Any) -> float:
    """A judge that answers after 20 ms."""
    await asyncio.sleep(0.02)
    return 0.0


async def read_tokens(busy: float) -> None:
    """Keep the thread busy for a share of the time, in slices of an output each."""
    while True:
        began = time.perf_counter()
        while (now := time.perf_counter()) < began + busy * STEP_S:
            while time.perf_counter() < now + OUTPUT_S:
                pass
            await asyncio.sleep(0)
        await asyncio.sleep(began + STEP_S - now)


async def timed(scorer: RewardScorer, number: int, latencies: list[float]) -> None:
    began = time.perf_counter()
    await scorer("x" * (1001 + number), Prompt("p", text="y" * 500, answer="7"))
    latencies.append(time.perf_counter() - began)


async def burst(call: Callable[[int], Awaitable[None]]) -> None:
    await asyncio.gather(*(call(i) for i in range(BURST)))


async def steady(call: Callable[[int], Awaitable[None]]) -> None:
    calls = []
    began = time.perf_counter()
    for i in range(300):
        await asyncio.sleep(max(0.0, began + i / 100 - time.perf_counter()))
        calls.append(asyncio.ensure_future(call(i)))
    await asyncio.gather(*calls)


async def measure(reward: Any, workers: int, busy: float) -> None:
    scorer = RewardScorer(Scoring(reward, workers=workers))
    await scorer.start()
    reading = asyncio.ensure_future(read_tokens(busy)) if busy else None
    for pattern in (burst, steady):
        latencies: list[float] = []
        began = time.perf_counter()
        await pattern(lambda i, latencies=latencies: timed(scorer, i, latencies))
        rate = len(latencies) / (time.perf_counter() - began)
        median, last = statistics.median(latencies), sorted(latencies)[int(len(latencies) * 0.99)]
        print(
            f"{reward.__name__:7} {pattern.__name__:6} {rate:6.0f} calls/s,"
            f" median {1e3 * median:5.0f} ms, 99 % within {1e3 * last:5.0f} ms"
        )
    if reading is not None:
        reading.cancel()
    scorer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=float, default=0.75, help="share of the time")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    for reward in (quick, uneven, judged):
        asyncio.run(measure(reward, args.workers, args.busy))
