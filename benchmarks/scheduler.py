"""What the scheduler and the buffer cost per chunk, and what a token takes in memory.

    python benchmarks/scheduler.py

Runs the scheduler on the simulated engine, one token per chunk, with ever more in flight. The same
engine with the same numbers in flight and nobody behind it is run in turns with it, and what it
takes is subtracted. Times are of the processor, so that other processes matter less; but they do
matter, and a figure counts only on an idle machine.

Python's collector of cycles is off meanwhile: each pass of it walks all that lives, which is mostly
the engine's, so that whose time that is cannot be told. ``--collector`` leaves it on.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from typing import Any

from harness import Report, Table, by_turns, parse, parser
from reward import reward
from workload import PROMPT_TOKENS, Prompts

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.engines.engine import Decoding, EngineSpec, GenerationRequest
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import LengthModel, StepTime
from copris_lightning.rollout.scheduler import RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.task import Task, trajectory_seed

STOP = 0
VOCAB = 100_000
MAX_TOKENS = 1000
LENGTHS = LengthModel(median=40.0, sigma=0.0)
"""Geometric: as many responses end in the first step as in the last."""
PROMPT = tuple(range(PROMPT_TOKENS))
GROUP = 8
NEVER = 10**9
"""Groups in a batch that no stage here will fill."""


class Setup(ABC):
    """An engine that makes a token per trajectory and virtual second, and who asks for them."""

    def __init__(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self.engine = SimulatedEngine(LENGTHS, StepTime(1.0, 0.0))
        self.loop = self.engine.new_event_loop()
        spec = EngineSpec("none", in_flight, PROMPT_TOKENS + MAX_TOKENS, VOCAB)
        self.loop.run_until_complete(self.engine.start(spec))
        self._work = [self.loop.create_task(work) for work in self.consumers()]
        self.run(2)

    @abstractmethod
    def consumers(self) -> Iterator[Coroutine[Any, Any, Any]]:
        """Whoever asks the engine, which is held."""

    def run(self, steps: int) -> tuple[float, int]:
        """Seconds that so many decoding steps took, and the chunks that they brought."""
        before = self.engine.tokens_made
        started = time.process_time()
        self.loop.run_until_complete(asyncio.sleep(steps))
        return time.process_time() - started, self.engine.tokens_made - before

    def close(self) -> None:
        for task in self._work:
            task.cancel()
        self.loop.run_until_complete(asyncio.wait(self._work))
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


class EngineAlone(Setup):
    """As many requests as are to be in flight; one that ends is followed by another."""

    def consumers(self) -> Iterator[Coroutine[Any, Any, Any]]:
        self.loop.run_until_complete(self.engine.release(0))
        numbers = itertools.count()
        return (self._consume(numbers) for _ in range(self.in_flight))

    async def _consume(self, numbers: Iterator[int]) -> None:
        decoding = Decoding(stop_token_ids=(STOP,))
        for number in numbers:
            seed = trajectory_seed(0, *divmod(number, GROUP))
            request = GenerationRequest(str(number), PROMPT, MAX_TOKENS, decoding, seed)
            async for _ in self.engine.stream(request):
                pass


class WithScheduler(Setup):
    """One stage that goes on and on. Its groups are dropped, so that no more and more are held."""

    def consumers(self) -> Iterator[Coroutine[Any, Any, Any]]:
        self.scheduler = RolloutScheduler(
            SharedEngine(self.engine, self.in_flight),
            CarryOverBuffer(
                limit=self.in_flight,
                group_size=GROUP,
                batch_groups=NEVER,
                max_new_tokens=MAX_TOKENS,
                stop_token_ids=(STOP,),
                max_staleness=1,
            ),
            Task(Prompts(), reward, lambda token_ids: "", Decoding(), accept=lambda group: False),
        )
        yield self.scheduler.take()

    def close(self) -> None:
        self.loop.run_until_complete(self.scheduler.close())
        super().close()


def us_per_chunk(in_flight: int, chunks: int, turns: int, *, collector: bool) -> list[float]:
    """Of scheduler and buffer, by turns of some steps with the engine alone and with them."""
    setups = {"alone": EngineAlone(in_flight), "scheduled": WithScheduler(in_flight)}
    steps = max(1, chunks // in_flight // turns)

    def turn(setup: Setup) -> float:
        gc.collect()
        if not collector:
            gc.disable()
        seconds, made = setup.run(steps)
        gc.enable()
        return 1e6 * seconds / made

    costs = by_turns({name: partial(turn, setup) for name, setup in setups.items()}, turns)
    for setup in setups.values():
        setup.close()
    return [both - one for both, one in zip(costs["scheduled"], costs["alone"], strict=True)]


def bytes_per_token(trajectories: int, length: int) -> float:
    """Of unfinished responses with the engine's log-probs and the trainer's, chunk by chunk."""
    buffer = CarryOverBuffer(
        limit=trajectories, group_size=1, batch_groups=1, max_new_tokens=length + 1
    )
    tracemalloc.start()
    for index in range(trajectories):
        buffer.admit(f"p{index}", index, PROMPT)
        started = buffer.next()
        assert started is not None
        for i in range(length):
            buffer.append((index, 0), [VOCAB - i], [-i / 7], 0)
        started.add_logprobs("trainer", [-i / 3 for i in range(length)])
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / (trajectories * length)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--in-flight", type=int, nargs="+", default=[100, 1_000, 10_000, 100_000])
    line.add_argument("--chunks", type=int, default=1_000_000, help="per number in flight, about")
    line.add_argument("--collector", action="store_true", help="leave it on")
    line.add_argument("--held", type=int, default=1_000_000, help="tokens to hold in memory")
    quick = {"in_flight": [100, 1_000], "chunks": 4000, "rounds": 2, "held": 2000}
    options = parse(line, arguments, quick)
    report = Report("scheduler", options)
    costs = {
        f"{n:,} in flight": us_per_chunk(
            n, options.chunks, options.rounds, collector=options.collector
        )
        for n in options.in_flight
    }
    report.add(Table("us per chunk", costs, (next(iter(costs)),), higher_is_better=False))
    held = {"held": [bytes_per_token(-(-options.held // 1000), 1000)]}
    report.add(Table("bytes per token", held, higher_is_better=False))
    report.write()


if __name__ == "__main__":
    main()
