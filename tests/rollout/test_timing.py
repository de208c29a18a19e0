"""The model of time against the scheduler itself: the same responses, on the same steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from rollouts import Rollout

from copris_lightning.core.timing.costs import Costs
from copris_lightning.core.timing.cycles import Cycles, Flow, Sizes
from copris_lightning.core.timing.lengths import Draws

LIMIT = 600
SIZES = {"batch_groups": 4, "group_size": 4, "max_new_tokens": LIMIT}
COSTS = Costs(step_s=0.02, slot_s=0.0002)
"""Of the engine that rollouts run on."""


class Seen:
    """The responses of a rollout, in the order of their groups. How long one is depends on the
    weights that wrote it; one that is unfinished was never seen to end, so the limit may end it."""

    def __init__(self, run: Rollout) -> None:
        every = [t for group in run.groups for t in group.trajectories]
        every += run.buffer.trajectories()
        every.sort(key=lambda t: (t.group_id, t.sample))
        self.left = iter([t.response_length if t.finish_reason else LIMIT for t in every])

    def draw(self, random: Random, count: int) -> Sequence[float]:
        return [next(self.left, LIMIT) for _ in range(count)]


@pytest.mark.parametrize("cap", [6, 16, 40])
@pytest.mark.parametrize("max_staleness", [0, 1, None])
def test_batches_take_as_long_as_the_schedulers(
    rollout: Callable[..., Rollout], cap: int, max_staleness: int | None
) -> None:
    run = rollout(
        **SIZES,
        cap=cap,
        max_staleness=max_staleness,
        median=120.0,
        stream_interval=16,
        logprobs=False,
    )
    real = []
    for _ in range(12):
        real.append(run.collect()[1].seconds)
        run.sync()
    sizes = Sizes(SIZES["batch_groups"], SIZES["group_size"], LIMIT)
    flow = Flow(max_staleness=max_staleness)
    model = Cycles(Draws(Seen(run), sizes.group_size), sizes, COSTS, flow, cap)
    seconds = [model.cycle() for _ in real]
    # The engine's place is free a step after a response has ended; the model's at once. That step
    # may move the end of one long response across the end of a stage, and back later.
    assert seconds == pytest.approx(real, rel=0.1)
    assert sum(seconds) == pytest.approx(sum(real), rel=0.01)
    if max_staleness == 0 and cap >= sizes.groups * sizes.group_size:
        assert seconds == pytest.approx(real, rel=0.001)


@pytest.mark.parametrize("cap", [16, 40])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("training_s", [0.0, 3.0, 30.0])
def test_a_run_takes_as_long_as_the_schedulers_in_every_flow(
    rollout: Callable[..., Rollout], cap: int, keeps: bool, streams: bool, training_s: float
) -> None:
    flow = Flow(streams, keeps, max_staleness=3)
    run = rollout(
        **SIZES,
        cap=cap,
        max_staleness=3,
        median=120.0,
        stream_interval=16,
        keeps=keeps,
        streams=streams,
        training_s=training_s,
    )
    for _ in range(12):
        run.collect()
        run.sync()
    seconds = run.loop.time()
    run.end_streams()
    sizes = Sizes(SIZES["batch_groups"], SIZES["group_size"], LIMIT)
    costs = replace(COSTS, batch_s=training_s)
    model = Cycles(Draws(Seen(run), sizes.group_size), sizes, costs, flow, cap)
    for _ in range(12):
        model.cycle()
    assert model.decoding.now == pytest.approx(seconds, rel=0.01)
