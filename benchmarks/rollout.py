"""How fast each way of rolling out makes tokens to train on, on a long tail of replayed lengths.

    python benchmarks/rollout.py [--caps 64 128] [--simulated]

Every response ends at a length drawn log-normally from its trajectory's seed, so that all ways
generate the same responses on one engine: vLLM's, with a model of 0.6 M parameters. After each
batch the engine gets new weights through files, as in a run. There is no trainer: nothing is
scored, and where the trainer would compute the behaviour log-probs that is not counted.

Each way keeps its trajectories from turn to turn. Its first batches are not counted, while the long
responses build up that a steady run carries; nor is the first of each turn.

Compared are tokens of the batches taken per second, against the faster of sync's two settings. In
the long run that is the rate of generation, which varies less over a few batches and stands beside.
"Uncut" is one stage without end, under one set of weights: the upper bound.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness import Report, Table, by_turns, parse, parser, picked
from models import quiet, qwen3, save
from reward import reward
from torch import Tensor
from workload import PROMPT_TOKENS, Lengths, Prompts, ReplayedSimulation, ReplayedVLLM

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.cap import Cap
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.engines.engine import Decoding, EngineSpec
from copris_lightning.engines.simulated_tokens import StepTime
from copris_lightning.rollout.loop_thread import LoopThread
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.task import Task
from copris_lightning.weights.export import as_saved

VOCAB = 98
GROUP_SIZE = 8
NEVER = 10**9
"""Groups of a batch that is never full."""


@dataclass(frozen=True)
class Way:
    """One way of rolling out.

    Attributes:
        logprobs: whether the engine is asked for log-probs.
        max_staleness: of trained tokens; 0 is sync.
        flow: what the shared engine is told besides the cap.
        has_stages: otherwise it is one stage that goes on, under one set of weights.
    """

    logprobs: bool
    max_staleness: int | None = None
    flow: Mapping[str, bool] = field(default_factory=dict)
    has_stages: bool = True


WAYS = {
    "sync": Way(logprobs=False, max_staleness=0),
    "sync, log-probs": Way(logprobs=True, max_staleness=0),
    "staged fresh": Way(logprobs=False),
    "staged fresh, log-probs": Way(logprobs=True),
    "staged kept": Way(logprobs=True, flow={"keeps": True}),
    "streaming fresh": Way(logprobs=True, flow={"streams": True}),
    "streaming kept": Way(logprobs=True, flow={"keeps": True, "streams": True}),
    "uncut": Way(logprobs=False, has_stages=False),
    "uncut, log-probs": Way(logprobs=True, has_stages=False),
}
SYNC = ("sync", "sync, log-probs")
UNCUT = ("uncut, log-probs",)


class Bench:
    """One engine for all ways, and the weights that it is given.

    Args:
        options: of the command line.
        folder: for the checkpoint.
    """

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options = options
        lengths = Lengths(options.median, options.sigma, options.limit)
        context = PROMPT_TOKENS + lengths.limit
        model = qwen3(128, 3, vocab=VOCAB, context=context, head_dim=32)
        weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
        self._weights = dict(as_saved(model, weights.items()))
        self.engine = self._new_engine()
        self.engine.length_of = lengths
        self._loop = LoopThread(self.engine.new_event_loop)
        self.run(self.engine.start(self._spec(save(model, folder), context)))
        self._transport = self.engine.transport(0, self.run)

    def _new_engine(self) -> Any:
        if self.options.simulated:
            # Near vLLM's CPU engine: 660 tokens/s at 1 in flight, 18,800 at 64.
            return ReplayedSimulation(step_time=StepTime(1.5e-3, 3e-5))
        arguments = {
            "dtype": "float32",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 2**29,
            "stream_interval": self.options.stream_interval,
        }
        return ReplayedVLLM(arguments)

    def _spec(self, model: str, context: int) -> EngineSpec:
        return EngineSpec(model, max(self.options.caps), context, VOCAB)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """On the engine's loop."""
        return self._loop.call(work)

    def now(self) -> float:
        """On its clock, in seconds."""

        async def time() -> float:
            return asyncio.get_running_loop().time()

        return float(self.run(time()))

    def swap(self, shared: SharedEngine) -> None:
        """What a weight sync does."""
        version = self.engine.version + 1

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self._weights.items():
                yield name, tensor * (1 + 1e-4 * (version % 2))

        self.run(shared.hold())
        self._transport.send(weights)
        self.run(shared.release(version))

    def close(self) -> None:
        """End the engine."""
        self._transport.close()
        self.run(self.engine.close())
        self._loop.close()


class Lane:
    """One way under one cap, with the trajectories that it carries from turn to turn.

    Args:
        bench: the engine.
        way: how.
        cap: trajectories in flight.

    Attributes:
        limit: of them, after the last turn.
    """

    def __init__(self, bench: Bench, way: Way, cap: Cap | int) -> None:
        self._bench = bench
        self._way = way
        self._cap = Cap(cap, cap) if isinstance(cap, int) else cap
        self.limit = float(self._cap.least)
        self._groups = bench.options.trajectories // GROUP_SIZE
        self._generated = 0
        self._completed: list[tuple[float, int, int]] = []
        self._goal: tuple[int, asyncio.Event] | None = None
        self._buffer = CarryOverBuffer(
            limit=self._cap.most,
            group_size=GROUP_SIZE,
            batch_groups=self._groups if way.has_stages else NEVER,
            max_new_tokens=bench.options.limit,
            max_staleness=way.max_staleness,
        )
        decoding = Decoding(logprobs=way.logprobs)
        accept = self._accept if not way.has_stages else lambda group: True
        self._task = Task(Prompts(), reward, lambda ids: "", decoding, accept=accept)

    def turn(self, settle: int, batches: int) -> dict[str, float]:
        """Roll out ``settle`` batches, and then those that are measured."""
        bench, way = self._bench, self._way
        shared = SharedEngine(bench.engine, self._cap, **way.flow)
        shared.places.restore(self.limit)
        scheduler = RolloutScheduler(shared, self._buffer, self._task, self._observe)
        bench.swap(shared)
        measure = self._stages if way.has_stages else self._one_stage
        try:
            return measure(shared, scheduler, settle, batches)
        finally:
            bench.run(shared.hold())
            bench.run(scheduler.close())
            self.limit = shared.places.limit()

    def _stages(
        self, shared: SharedEngine, scheduler: RolloutScheduler, settle: int, batches: int
    ) -> dict[str, float]:
        bench, engine = self._bench, self._bench.engine
        trained = sync = 0.0
        for number in range(settle + batches):
            if number == settle:
                trained = sync = 0.0
                start, before = bench.now(), self._generated
                sent, cached = engine.sent_again, engine.cached
            groups, _ = bench.run(scheduler.take())
            trained += _tokens(groups)
            taken = bench.now()
            bench.swap(shared)
            sync += bench.now() - taken
        seconds, generated = bench.now() - start, self._generated - before
        sent, cached = engine.sent_again - sent, engine.cached - cached
        return {
            "trained": trained / seconds,
            "generated": generated / seconds,
            "sync": sync / batches,
            "sent": sent / generated,
            "computed": (sent - cached) / generated,
        }

    def _one_stage(
        self, shared: SharedEngine, scheduler: RolloutScheduler, settle: int, batches: int
    ) -> dict[str, float]:
        self._bench.run(self._until_completed(scheduler, self._groups * (settle + batches)))
        (start, _, before), *counted = self._completed[self._groups * settle - 1 :]
        end, _, after = counted[-1]
        trained = sum(tokens for _, tokens, _ in counted)
        return {"trained": trained / (end - start), "generated": (after - before) / (end - start)}

    async def _until_completed(self, scheduler: RolloutScheduler, groups: int) -> None:
        self._completed.clear()
        self._goal = (groups, asyncio.Event())
        stage = asyncio.ensure_future(scheduler.take())
        reached = asyncio.ensure_future(self._goal[1].wait())
        await asyncio.wait([stage, reached], return_when=asyncio.FIRST_COMPLETED)
        if stage.done():
            stage.result()
        stage.cancel()
        await asyncio.wait([stage])

    def _observe(self, event: Event) -> None:
        if event.kind == "chunk":
            self._generated += event.tokens

    def _accept(self, group: PromptGroup) -> bool:
        assert self._goal is not None
        now = asyncio.get_running_loop().time()
        self._completed.append((now, _tokens([group]), self._generated))
        if len(self._completed) >= self._goal[0]:
            self._goal[1].set()
        return False


def _tokens(groups: Sequence[PromptGroup]) -> int:
    return sum(t.response_length for group in groups for t in group.trajectories)


def compare(bench: Bench, report: Report, cap: int) -> None:
    """All ways under one cap."""
    options = bench.options
    lanes = {name: Lane(bench, WAYS[name], cap) for name in options.ways}
    for name, lane in lanes.items():
        if WAYS[name].max_staleness != 0:
            lane.turn(options.steady, 1)
    turns = by_turns(
        {name: partial(lane.turn, 1, options.batches) for name, lane in lanes.items()},
        options.rounds,
    )
    for key in ("trained", "generated"):
        rates = picked(turns, key)
        report.add(Table(f"cap {cap}: {key} tokens/s", rates, SYNC))
    if UNCUT[0] in rates:
        asked = {name: values for name, values in rates.items() if WAYS[name].logprobs}
        title = f"cap {cap}: generated tokens/s with the engine's log-probs"
        report.add(Table(title, asked, UNCUT))
    staged = {name: values for name, values in turns.items() if WAYS[name].has_stages}
    for key, title in (
        ("sent", "prefix tokens sent again per token received"),
        ("computed", "prefix tokens computed again per token received"),
        ("sync", "seconds of a weight sync"),
    ):
        figures = picked(staged, key)
        report.add(Table(f"cap {cap}: {title}", figures, higher_is_better=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=3)
    line.add_argument("--caps", type=int, nargs="+", default=[64, 128])
    line.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    line.add_argument("--trajectories", type=int, default=64, help="of a batch")
    line.add_argument("--batches", type=int, default=8, help="measured in a turn")
    line.add_argument("--steady", type=int, default=10, help="batches until it is steady")
    line.add_argument("--median", type=float, default=120.0)
    line.add_argument("--sigma", type=float, default=1.0)
    line.add_argument("--limit", type=int, default=1500)
    line.add_argument("--stream-interval", type=int, default=8)
    line.add_argument("--simulated", action="store_true", help="virtual time, no vLLM")
    quick = {"caps": [16], "trajectories": 16, "batches": 3, "steady": 3}
    options = parse(line, arguments, {**quick, "median": 12.0, "limit": 120})
    quiet()
    report = Report("rollout", options)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        try:
            for cap in options.caps:
                compare(bench, report, cap)
        finally:
            bench.close()
    report.write()


if __name__ == "__main__":
    main()
