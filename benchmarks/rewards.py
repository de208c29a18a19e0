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
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from harness import Report, Table, by_turns, parse, parser, picked

from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

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


async def burst(call: Callable[[int], Awaitable[None]], calls: int) -> None:
    """All at once."""
    await asyncio.gather(*(call(i) for i in range(calls)))


async def steady(call: Callable[[int], Awaitable[None]], calls: int) -> None:
    """A hundred a second."""
    going = []
    began = time.perf_counter()
    for i in range(calls):
        await asyncio.sleep(max(0.0, began + i / 100 - time.perf_counter()))
        going.append(asyncio.ensure_future(call(i)))
    await asyncio.gather(*going)


PATTERNS = {"burst": burst, "steady": steady}


async def measure(reward: Any, pattern: str, options: argparse.Namespace) -> dict[str, float]:
    """One pattern of calls, in a pool of its own."""
    scorer = RewardScorer(Scoring(reward, workers=options.workers))
    await scorer.start()
    reading = asyncio.ensure_future(read_tokens(options.busy)) if options.busy else None
    latencies: list[float] = []
    began = time.perf_counter()
    await PATTERNS[pattern](lambda i: timed(scorer, i, latencies), getattr(options, pattern))
    rate = len(latencies) / (time.perf_counter() - began)
    if reading is not None:
        reading.cancel()
    scorer.close()
    last = sorted(latencies)[int(len(latencies) * 0.99)]
    return {"rate": rate, "median": 1e3 * statistics.median(latencies), "last": 1e3 * last}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=3)
    line.add_argument("--busy", type=float, default=0.75, help="share of the time")
    line.add_argument("--workers", type=int, default=1)
    line.add_argument("--burst", type=int, default=136, help="calls at once")
    line.add_argument("--steady", type=int, default=300, help="calls, a hundred a second")
    options = parse(line, arguments, {"burst": 10, "steady": 10})
    report = Report("rewards", options)
    variants = {
        f"{reward.__name__}, {pattern}": lambda reward=reward, pattern=pattern: asyncio.run(
            measure(reward, pattern, options)
        )
        for reward in (quick, uneven, judged)
        for pattern in PATTERNS
    }
    turns = by_turns(variants, options.rounds)
    report.add(Table("calls/s", picked(turns, "rate")))
    for key, title in (("median", "ms of a call"), ("last", "ms within which are 99 %")):
        report.add(Table(title, picked(turns, key), higher_is_better=False))
    report.write()


if __name__ == "__main__":
    main()
