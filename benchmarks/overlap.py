"""What generation costs a training step that goes on beside it, as in `flow.mode: streaming`.

    python benchmarks/overlap.py [--caps 64 256] [--threads 1]

Rank 0 trains in its main thread. The rollout loop is a thread of the same process, so both want one
interpreter lock; and the engine's processes want processors. These are told apart by turns, under a
full cap and with log-probs: with the engine's client in this process, and with all of the engine in
a process of its own, which takes as much of the processors and little of the lock.

Steps are those of ``training_step.py``. The share is the loop's processor time per second; us per
token depend the least on what else runs.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from harness import Report, Table, by_turns, parse, parser, picked
from models import quiet, qwen3, rows, save
from reward import reward
from torch import Tensor
from training_step import ours
from workload import PROMPT_TOKENS, Lengths, Prompts, ReplayedVLLM

from copris_lightning.core.batching import collate
from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.estimator.normalization import UpdateTotals
from copris_lightning.engines.apart import ApartEngine
from copris_lightning.engines.engine import Decoding, Engine, EngineSpec
from copris_lightning.rollout.loop_thread import LoopThread
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.task import Task

VOCAB = 98
GROUP_SIZE = 8
NEVER = 10**9
"""Groups of a batch that is never full."""


class Generation:
    """One stage that goes on and on, on an engine of its own. Its groups are dropped.

    Args:
        options: of the command line.
        checkpoint: of the engine's model.
        cap: trajectories in flight.
        apart: whether the engine is in a process of its own.
    """

    def __init__(
        self, options: argparse.Namespace, checkpoint: str, cap: int, *, apart: bool
    ) -> None:
        self._cap = cap
        self._limit = options.limit
        self._received = 0
        lengths = Lengths(options.median, options.sigma, options.limit)
        context = PROMPT_TOKENS + lengths.limit
        arguments = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2**29}
        engine = ReplayedVLLM(arguments)
        engine.length_of = lengths
        self._engine: Engine = ApartEngine(engine) if apart else engine
        self._loop = LoopThread(self._engine.new_event_loop)
        self._run(self._engine.start(EngineSpec(checkpoint, cap, context, VOCAB)))
        self._shared = SharedEngine(self._engine, cap)
        self._run(self._shared.release(0))
        self._clock = self._run(_this_threads_clock())
        self._stage: asyncio.Task[Any] | None = None

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.call(work)

    def begin(self) -> None:
        """Return when the cap is full."""
        buffer = CarryOverBuffer(
            limit=self._cap,
            group_size=GROUP_SIZE,
            batch_groups=NEVER,
            max_new_tokens=self._limit,
        )
        task = Task(Prompts(), reward, lambda ids: "", Decoding(), accept=lambda group: False)
        self._scheduler = RolloutScheduler(self._shared, buffer, task, self._observe)
        self._run(self._start())
        while self._scheduler.in_flight < self._cap:
            assert self._stage is not None
            assert not self._stage.done(), self._stage
            time.sleep(0.01)

    async def _start(self) -> None:
        self._stage = asyncio.get_running_loop().create_task(self._scheduler.take())

    async def _stop(self) -> None:
        assert self._stage is not None
        self._stage.cancel()
        await asyncio.wait([self._stage])
        await self._scheduler.close()

    def figures(self) -> tuple[int, float]:
        """Tokens received so far, and seconds of a processor that the loop has taken."""
        return self._received, time.clock_gettime(self._clock)

    def end(self) -> None:
        """Until the next :meth:`begin`."""
        self._run(self._stop())

    def close(self) -> None:
        """End the engine."""
        self._run(self._engine.close())
        self._loop.close()

    def _observe(self, event: Event) -> None:
        if event.kind == "chunk":
            self._received += event.tokens


async def _this_threads_clock() -> int:
    return time.pthread_getcpuclockid(threading.get_ident())


def steps(
    step: Callable[[], Tensor], count: int, generation: Generation | None = None
) -> dict[str, float]:
    """Some training steps, with or without generation beside them."""
    if generation is None:
        return _steps(step, count)
    generation.begin()
    try:
        tokens, taken = generation.figures()
        figures = _steps(step, count)
        after, taken_after = generation.figures()
    finally:
        generation.end()
    seconds = count * figures["seconds"]
    return {
        **figures,
        "tokens": (after - tokens) / seconds,
        "share": (taken_after - taken) / seconds,
        "us": 1e6 * (taken_after - taken) / max(1, after - tokens),
    }


def _steps(step: Callable[[], Tensor], count: int) -> dict[str, float]:
    step()
    started, taken = time.perf_counter(), time.thread_time()
    for _ in range(count):
        step()
    ended, taken_after = time.perf_counter(), time.thread_time()
    return {"seconds": (ended - started) / count, "thread": (taken_after - taken) / count}


def compare(options: argparse.Namespace, report: Report, folder: str, cap: int) -> None:
    """Steps beside generation under one cap."""
    model = qwen3(128, 3, vocab=VOCAB, context=PROMPT_TOKENS + options.limit, head_dim=32)
    checkpoint = save(model, f"{folder}/engine")
    step = trainer(options, folder)
    variants = {"alone": partial(steps, step, options.steps)}
    with ExitStack() as stack:
        for name, apart in (("client here", False), ("engine apart", True)):
            generation = Generation(options, checkpoint, cap, apart=apart)
            stack.callback(generation.close)
            variants[name] = partial(steps, step, options.steps, generation)
        turns = by_turns(variants, options.rounds, warm_up=1)
    for key, title in (("seconds", "seconds of a step"), ("thread", "processor seconds of a step")):
        table = Table(f"cap {cap}: {title}", picked(turns, key), ("alone",), higher_is_better=False)
        report.add(table)
    del turns["alone"]
    for key, title in (
        ("share", "the loop's share of a processor"),
        ("us", "us of the loop per token"),
        ("tokens", "tokens/s generated beside"),
    ):
        report.add(Table(f"cap {cap}: {title}", picked(turns, key), higher_is_better=False))


def trainer(options: argparse.Namespace, folder: str) -> Callable[[], Tensor]:
    """A training step on a fixed batch."""
    checkpoint = save(qwen3(options.hidden_size, options.layers), f"{folder}/trainer")
    lengths = [options.row_tokens] * options.rows
    totals = UpdateTotals(len(lengths), sum(lengths) - PROMPT_TOKENS * len(lengths), max(lengths))
    return ours(checkpoint, collate(rows(lengths, seed=0), source=None, totals=totals))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--caps", type=int, nargs="+", default=[64, 256])
    line.add_argument("--steps", type=int, default=6, help="measured in a turn")
    line.add_argument("--threads", type=int, help="of the trainer; torch's own choice otherwise")
    line.add_argument("--rows", type=int, default=16)
    line.add_argument("--row-tokens", type=int, default=96)
    line.add_argument("--hidden-size", type=int, default=256)
    line.add_argument("--layers", type=int, default=6)
    line.add_argument("--median", type=float, default=120.0)
    line.add_argument("--sigma", type=float, default=1.0)
    line.add_argument("--limit", type=int, default=1500)
    quick = {"caps": [8], "steps": 1, "rows": 4, "hidden_size": 64, "layers": 1}
    options = parse(line, arguments, {**quick, "median": 12.0, "limit": 120})
    quiet()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report("overlap", options)
    for cap in options.caps:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, report, folder, cap)
    report.write()


if __name__ == "__main__":
    main()
