"""Stops and failures: nothing is lost by a cancel, and an error surfaces soon and says where."""

from __future__ import annotations

import asyncio

import pytest

from copris_lightning.core.buffer import Status
from copris_lightning.engines.engine import Chunk, EngineSpec, Load, Span
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import Faults
from copris_lightning.errors import ConfigurationError, EngineError, RewardError

SMALL = {"cap": 4, "batch_groups": 1, "group_size": 2, "median": 4.0, "max_new_tokens": 12}


def explained(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


# -- cancelling ----------------------------------------------------------------------------


def cancel_at(run, index: int, stages: int = 3) -> bool:
    """Cancel the collect() that is running at an event; False if the event never comes."""
    loop = run.loop
    collecting: list[asyncio.Task] = []

    def look(event):
        if len(run.events) - 1 == index:
            collecting[-1].cancel()

    run.watchers.append(look)
    for _ in range(stages):
        collecting.append(loop.create_task(run.scheduler.take()))
        try:
            groups, _ = loop.run_until_complete(collecting[-1])
        except asyncio.CancelledError:
            return True
        run.groups += groups
        run.sync()
    return False


def event_kinds(run, stages: int = 3) -> list[str]:
    run.stages(stages)
    return [event.kind for event in run.events]


def test_a_stop_at_any_event_loses_no_token_and_leaves_nothing_in_flight(rollout):
    settings = {**SMALL, "faults": Faults(empty_chunk_rate=0.2, late_finish_rate=0.5)}
    kinds = event_kinds(rollout(**settings))
    assert len(kinds) > 60
    for index, kind in enumerate(kinds):
        if kind == "deliver":  # the stage is over: there is nothing left to cancel
            continue
        run = rollout(**settings)
        assert cancel_at(run, index), f"event {index} ({kind}) did not cancel"
        groups = len(run.groups)
        # Its groups are still there: a cancelled stage returns nothing, so it may take nothing.
        run.check_conservation()
        assert run.buffer.in_flight == 0
        assert run.engine.load() == Load(0, 0)
        seen = len(run.engine.requests)
        trajectories = [t for g in run.groups for t in g.trajectories]
        kept = {
            run.seed_of((t.group_id, t.sample)): t.tokens.tolist()
            for t in [*trajectories, *run.buffer.trajectories()]
            if t.response_length
        }
        assert kept == {s: tokens for s, tokens in run.engine.emitted.items() if tokens}
        run.run(asyncio.sleep(1.0))
        assert len(run.engine.requests) == seen, "work went on after the stop"
        run.watchers.clear()
        run.sync()
        run.stages(3)
        assert len(run.groups) == groups + 3
        run.check_all_tokens()
        run.check_conservation()
        run.close()


def test_a_cancelled_collect_raises_cancelled_error(rollout):
    run = rollout()

    async def cancelled():
        task = asyncio.create_task(run.scheduler.take())
        await asyncio.sleep(0.05)
        assert run.buffer.in_flight == 12
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert run.run(cancelled())
    assert run.buffer.in_flight == 0


def test_a_timeout_around_collect_is_seen_by_its_caller(rollout):
    run = rollout(sigma=0.0, median=1000.0, max_new_tokens=1000)

    async def impatient():
        async with asyncio.timeout(0.5):
            await run.scheduler.take()

    with pytest.raises(TimeoutError):
        run.run(impatient())
    assert run.loop.time() == pytest.approx(0.5)


def test_closing_cancels_rewards_and_keeps_the_responses(rollout):
    async def never(response, prompt):
        await asyncio.Event().wait()
        return 1.0

    run = rollout(scorer=never)
    task = run.loop.create_task(run.scheduler.take())
    run.run(asyncio.sleep(1.0))
    task.cancel()
    run.run(asyncio.wait([task]))
    finished = run.buffer.keys(Status.FINISHED)
    assert finished
    run.run(run.scheduler.close())
    assert not [t for t in asyncio.all_tasks(run.loop) if "RolloutScheduler" in repr(t)]
    assert run.buffer.keys(Status.FINISHED) == finished
    run.run(run.scheduler.close())


# -- rewards that fail ---------------------------------------------------------------------


class Judge:
    """A scorer in virtual time that fails on one prompt, each time or once."""

    def __init__(self, outcome, *, failing="p1", times=10**9, after_s=0.0):
        self.outcome = outcome
        self.failing = failing
        self.times = times
        self.after_s = after_s

    async def __call__(self, response, prompt):
        if prompt.id != self.failing or self.times == 0:
            return 1.0
        self.times -= 1
        await asyncio.sleep(self.after_s)
        raise RewardError(f"prompt {prompt.id!r}: {self.outcome}") from self.outcome


def test_a_failing_reward_ends_the_stage_with_cause_and_prompt(rollout):
    outcome = ZeroDivisionError("oops")
    run = rollout(scorer=Judge(outcome))
    with pytest.raises(RewardError, match="'p1': oops") as caught:
        run.collect()
    assert caught.value.__cause__ is outcome
    # The first failing response ended it, not the last trajectory of the stage.
    finishes = [e.time for e in run.of_kind("finish") if e.key[0] == 1]
    assert run.loop.time() == pytest.approx(finishes[0])
    assert run.buffer.in_flight == 0
    assert run.engine.load() == Load(0, 0)


def test_the_response_of_a_failed_reward_is_kept_and_scored_again(rollout):
    run = rollout(scorer=Judge(ValueError("a bad moment"), times=1))
    with pytest.raises(RewardError, match="a bad moment"):
        run.collect()
    assert len(run.buffer.keys(Status.FINISHED)) == 1
    run.stages(10)
    assert "p1" in run.trained()
    run.check_all_tokens()


def test_a_reward_that_fails_during_training_is_raised_by_the_next_stage(rollout):
    scorer = Judge(ValueError("a bad moment"), times=1, after_s=20.0)
    run = rollout(cap=40, scorer=scorer)
    run.collect()
    assert "p1" not in run.trained()
    assert scorer.times == 0  # its reward is being computed
    run.run(asyncio.sleep(30.0))
    with pytest.raises(RewardError, match="'p1': a bad moment"):
        run.collect()
    assert run.buffer.in_flight == 0
    run.stages(5)
    assert "p1" in run.trained()


# -- engines that fail ---------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 17, 60])
def test_an_engine_that_dies_ends_the_stage_and_names_a_prompt(rollout, after):
    run = rollout(faults=Faults(die_after_tokens=after), median=30.0)
    with pytest.raises(EngineError, match="died, as told to") as caught:
        run.collect()
    assert "while generating prompt 'p" in explained(caught.value)
    # One token for each of the 12 in flight takes a step of 22.4 ms.
    assert run.loop.time() <= (after // 12 + 2) * 0.0224
    assert run.buffer.in_flight == 0
    assert sum(t.response_length for t in run.buffer.trajectories()) == sum(
        len(tokens) for tokens in run.engine.emitted.values()
    )
    run.check_all_tokens()
    run.check_conservation()


def test_a_dead_engine_stays_an_error(rollout):
    run = rollout(faults=Faults(die_after_tokens=5))
    for says in ("died, as told to", "is not running"):
        with pytest.raises(EngineError, match=says):
            run.collect()


def test_tokens_of_a_dead_engine_are_finished_by_the_next(rollout):
    run = rollout(faults=Faults(die_after_tokens=100), median=20.0)
    with pytest.raises(EngineError):
        run.stages(10)
    heir = rollout(median=20.0)
    heir.prompts.taken = run.prompts.taken
    heir.buffer.load_state_dict(run.buffer.state_dict())
    heir.groups = run.groups
    heir.sync(run.shared.version)
    assert heir.buffer.count(Status.CARRIED_OVER) > 0
    heir.stages(10)
    heir.check_all_tokens()
    heir.check_conservation()


class ScriptedEngine(SimulatedEngine):
    """Answers every request with the same chunks or error."""

    def __init__(self, *script):
        super().__init__()
        self.script = script

    async def hold(self, *, keep=False):
        """Its streams end by themselves, in no time."""

    async def release(self, version, *, clear_kv=True):
        """It needs none."""

    async def stream(self, request):
        for item in self.script:
            await asyncio.sleep(0.01)
            if isinstance(item, Exception):
                raise item
            yield item


def test_labels_that_the_engine_contradicts_are_an_error_where_no_stream_outlives_a_hold(rollout):
    run = rollout(**SMALL, engine=ScriptedEngine(Chunk((5,), (-1.0,), 1, "stop", (Span(1, 1, 0),))))
    run.sync(1)
    says = r"labelled .*version=1, kv_version=1.*, and the engine says .*version=1, kv_version=0"
    with pytest.raises(EngineError, match=says):
        run.collect()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ([Chunk((5,), (-1.0,), 0)], "ended after 1 tokens without saying why"),
        ([], "ended after 0 tokens without saying why"),
        ([Chunk((5, 6), (-1.0,), 0)], "2 tokens came with 1 log-probs"),
        ([Chunk((5,), (-1.0,), 1)], "token of version 1, current is 0"),
        ([Chunk((3, 5), (-1.0, -1.0), 0)], "tokens follow a stop token"),
        ([Chunk((5,), (-1.0,), 0, "stop")], r"sent 1 tokens, and its spans are \(\)"),
        (
            [Chunk((5,), (-1.0,), 0, "stop", (Span(1, 1, 0),))],
            "token of version 1, current is 0",
        ),
        ([Chunk((5,), (-1.0,), 0, "held", (Span(1, 0, 0),))], "was held by somebody else"),
        ([Chunk((5,), (-1.0,), 0, "abort")], "ended the response by itself: abort"),
        ([Chunk((5,) * 13, (-1.0,) * 13, 0)], "exceed the limit of 12"),
        ([Chunk((5,), (-1.0,), 0), EngineError("CUDA says no")], "CUDA says no"),
        ([ConfigurationError("no such model")], "no such model"),
    ],
    ids=[
        "no reason",
        "no chunk",
        "unequal",
        "future version",
        "after stop",
        "no spans",
        "other spans",
        "held",
        "aborted",
        "too long",
        "engine error",
        "configuration error",
    ],
)
def test_an_engine_that_breaks_its_contract_is_told_with_the_prompt(rollout, script, says):
    engine = ScriptedEngine(*script)
    run = rollout(**SMALL, engine=engine)
    with pytest.raises((EngineError, ConfigurationError), match=says) as caught:
        run.collect()
    assert "'p0'" in explained(caught.value)
    assert run.loop.time() < 0.1
    assert run.buffer.in_flight == 0


def test_an_early_finish_reason_ends_a_response_that_has_no_stop_token(rollout):
    engine = ScriptedEngine(
        Chunk((5, 6), (-1.0, -2.0), 0), Chunk((), (), 0, "length", (Span(2, 0, 0),))
    )
    run = rollout(**SMALL, engine=engine)
    groups, _ = run.collect()
    for trajectory in groups[0].trajectories:
        assert trajectory.tokens.tolist() == [5, 6]
        assert trajectory.finish_reason == "length"


def test_tokens_after_the_end_are_not_asked_for(rollout):
    class Counting(ScriptedEngine):
        asked = 0

        async def stream(self, request):
            yield Chunk((5, 3), (-1.0, -2.0), 0)
            Counting.asked += 1
            yield Chunk((5,), (-1.0,), 0)

    run = rollout(**SMALL, engine=Counting())
    run.collect()
    assert Counting.asked == 0


def test_the_simulated_engine_must_be_started(rollout):
    run = rollout(**SMALL, engine=SimulatedEngine())
    with pytest.raises(EngineError, match="is not running"):
        run.collect()
    run.run(run.engine.start(EngineSpec("none", 4, 30, 50)))
    run.collect()
