"""Does a token cost more when there is more of everything? Nothing should grow but the engine.

    python benchmarks/scale.py

Two things are scaled up. Whole stages on the simulated engine, with the batch as large as the cap:
take, hold, carry over, rise of the version, resume. And the buffer alone, by the number of groups
that stand in it while a few trajectories go through.

Times are of the processor, and the simulated engine's own are in the first; ``scheduler.py`` tells
those apart.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from harness import Report, Table, by_turns, parse, parser
from reward import reward
from workload import PROMPT_TOKENS, Prompts

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.engines.engine import Decoding, EngineSpec
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import LengthModel, StepTime
from copris_lightning.rollout.scheduler import RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.task import Task

GROUP = 8
PROMPT = tuple(range(PROMPT_TOKENS))
STOP, VOCAB, MAX_TOKENS = 0, 1000, 200


class Stages:
    """Whole stages, a batch as large as the cap.

    Args:
        cap: trajectories in flight.
    """

    def __init__(self, cap: int) -> None:
        self.engine = SimulatedEngine(LengthModel(median=40.0), StepTime(1.0, 0.0), None, 8)
        self.loop = self.engine.new_event_loop()
        spec = EngineSpec("none", cap, PROMPT_TOKENS + MAX_TOKENS, VOCAB)
        self.loop.run_until_complete(self.engine.start(spec))
        buffer = CarryOverBuffer(
            limit=cap,
            group_size=GROUP,
            batch_groups=max(1, cap // GROUP),
            max_new_tokens=MAX_TOKENS,
            stop_token_ids=(STOP,),
        )
        self.shared = SharedEngine(self.engine, cap)
        task = Task(Prompts(), reward, lambda token_ids: "", Decoding())
        self.scheduler = RolloutScheduler(self.shared, buffer, task)

    def turn(self) -> float:
        """Roll out one more batch. Returns microseconds of the processor per trained token."""
        started = time.process_time()
        groups, _ = self.loop.run_until_complete(self.scheduler.take())
        self.loop.run_until_complete(self.shared.hold())
        self.loop.run_until_complete(self.shared.release(self.engine.version + 1))
        took = time.process_time() - started
        return 1e6 * took / sum(t.response_length for group in groups for t in group.trajectories)

    def close(self) -> None:
        """End all that is carried over."""
        self.loop.run_until_complete(self.scheduler.close())
        self.loop.run_until_complete(self.engine.close())
        self.loop.close()


def passing(groups: int, trajectories: int) -> Callable[[], float]:
    """Brings trajectories through a buffer in which so many groups stand, unfinished.

    Returns:
        microseconds of the processor per trajectory.
    """
    buffer = CarryOverBuffer(
        limit=groups + GROUP, group_size=GROUP, batch_groups=1, max_new_tokens=MAX_TOKENS
    )
    names = (f"p{number}" for number in itertools.count())
    standing = []
    for index in range(groups):
        group_id = buffer.admit(next(names), index, PROMPT)
        for sample in range(GROUP):
            started = buffer.next()
            assert started is not None
            if sample:  # one of each group stays in flight
                buffer.append((group_id, sample), [1], [-1.0], 0, stops=True)
                buffer.score((group_id, sample), 1.0)
        standing.append((group_id, 0))

    def turn() -> float:
        started = time.process_time()
        for _ in range(trajectories // GROUP):
            group_id = buffer.admit(next(names), 0, PROMPT)
            for _ in range(GROUP):
                buffer.next()
            for sample in range(GROUP):
                key = (group_id, sample)
                buffer.append(key, [1, 2, 3], [-1.0, -2.0, -3.0], buffer.version)
                buffer.append(key, [1, 2, 3], [-1.0, -2.0, -3.0], buffer.version, stops=True)
                buffer.score(key, 1.0)
            assert buffer.can_take()
            buffer.take()
            buffer.advance(buffer.version + 1)
        return 1e6 * (time.process_time() - started) / trajectories

    return turn


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--caps", type=int, nargs="+", default=[64, 512, 4096, 16384])
    line.add_argument("--groups", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    line.add_argument("--trajectories", type=int, default=8000, help="through the buffer, a turn")
    quick = {"caps": [16, 32], "groups": [2, 4], "trajectories": 80}
    options = parse(line, arguments, quick)
    report = Report("scale", options)

    def compare(title: str, variants: Mapping[str, Callable[[], float]]) -> None:
        values = by_turns(variants, options.rounds, warm_up=1)
        report.add(Table(title, values, (next(iter(variants)),), higher_is_better=False))

    stages = {f"{cap:,} in flight": Stages(cap) for cap in options.caps}
    compare("whole stages: us per trained token", {name: one.turn for name, one in stages.items()})
    for one in stages.values():
        one.close()
    buffers = {f"{n:,} groups": passing(n, options.trajectories) for n in options.groups}
    compare("buffer: us per trajectory", buffers)
    report.write()


if __name__ == "__main__":
    main()
