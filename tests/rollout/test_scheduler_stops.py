"""Stop strings in whole rollouts: a response ends where its text says so, and tokens add up."""

from __future__ import annotations

import copy
import string
from collections.abc import AsyncGenerator, Sequence
from itertools import islice
from typing import Any

import pytest

from copris_lightning.core.trajectory import Trajectory
from copris_lightning.engines.engine import Chunk, EngineSpec, GenerationRequest, Load
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import LengthModel, simulate_token

VOCAB, STOP = 50, 3  # the rollout fixture's
LETTERS = string.ascii_letters[:VOCAB]
STOPS = tuple(a + b for a in LETTERS[10:20] for b in LETTERS[20:30])  # a twenty-fifth of all pairs


def decode(token_ids: Sequence[int]) -> str:
    return "".join(LETTERS[token] for token in token_ids)


def check(run: Any, trajectory: Trajectory) -> None:
    """Its tokens are the simulated engine's, and it ends where they say."""
    seed = run.seed_of((trajectory.group_id, trajectory.sample))
    prefix, tokens = list(trajectory.prompt), iter(trajectory.tokens)
    mean = run.engine.lengths.mean(seed)
    ends = []
    for segment in trajectory.segments:
        for token in islice(tokens, segment.length):
            made, _ = simulate_token(
                segment.version,
                segment.version,
                prefix,
                seed,
                vocab_size=VOCAB,
                stop=STOP,
                mean=mean,
            )
            assert token == made
            prefix.append(token)
            text = decode(prefix[len(trajectory.prompt) :])
            ends.append(token == STOP or any(stop in text for stop in STOPS))
    is_cut = len(ends) == trajectory.max_new_tokens and not ends[-1]
    assert not any(ends[:-1])
    if trajectory.finish_reason is None:
        assert not any(ends)
        assert not is_cut
    else:
        assert trajectory.finish_reason == ("length" if is_cut else "stop")
        assert ends[-1] or is_cut


def coarse_rollout(rollout: Any, size: int, **settings: Any) -> Any:
    engine = SimulatedEngine(LengthModel(30.0, 0.5), stream_interval=size)
    run = rollout(engine=engine, decode=decode, stops=STOPS, max_new_tokens=40, **settings)
    run.run(engine.start(EngineSpec("none", 12, 60, VOCAB)))
    run.watchers.append(
        # A finished response's place is taken before the engine has been told to end it.
        lambda event: assert_at_most(engine.load().running, run.buffer.limit + 1)
    )
    return run


def assert_at_most(value: int, limit: int) -> None:
    assert value <= limit


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    rollout: Any, size: int
) -> None:
    run = coarse_rollout(rollout, size)
    received = dropped = 0
    for _ in range(12):
        _, stats = run.collect()
        assert run.engine.load() == Load(0, 0)
        received += stats.tokens
        dropped += stats.dropped_tokens
        run.sync()
    finished = [t for group in run.groups for t in group.trajectories]
    inside = list(run.buffer.trajectories())
    for trajectory in [*finished, *inside]:
        check(run, trajectory)
    # Generated = trained + still there + dropped by the rule.
    assert received == dropped + sum(t.response_length for t in [*finished, *inside])
    assert (dropped > 0) == (size > 1)
    by_string = [t for t in finished if t.finish_reason == "stop" and not ended_by_token(t)]
    assert len(by_string) > len(finished) / 3
    # Some strings were cut in two by a stage's end, and found.
    assert any(len(t.segments) > 1 and t.segments[-1].length == 1 for t in by_string)


def ended_by_token(trajectory: Trajectory) -> bool:
    return trajectory.tokens[-1] == STOP


def test_a_stop_string_at_the_limit_is_a_stop(rollout: Any) -> None:
    run = coarse_rollout(rollout, 1)
    run.stages(25)
    at_limit = [t for group in run.groups for t in group.trajectories if t.response_length == 40]
    assert {t.finish_reason for t in at_limit} >= {"length"}
    for trajectory in at_limit:
        check(run, trajectory)


def test_a_restored_response_goes_on_looking(rollout: Any) -> None:
    run = coarse_rollout(rollout, 2)
    run.stages(3)
    saved = copy.deepcopy(run.buffer.state_dict())
    other = coarse_rollout(rollout, 2)
    other.sync(run.shared.version)
    other.buffer.load_state_dict(saved)
    other.prompts.taken = run.prompts.taken
    run.groups.clear()
    for one in (run, other):
        one.stages(4)
        for group in one.groups:
            for trajectory in group.trajectories:
                check(one, trajectory)
    tokens = [[t.tokens for g in one.groups for t in g.trajectories] for one in (run, other)]
    assert tokens[0] == tokens[1]


def test_a_chunk_that_does_not_fit_is_refused_though_it_is_cut(rollout: Any) -> None:
    class OneTooFew(SimulatedEngine):
        async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
            yield Chunk((0, 10, 20, 0), (-1.0, -1.0, -1.0), 0)

    engine = OneTooFew()
    run = rollout(engine=engine, decode=decode, stops=STOPS)
    run.run(engine.start(EngineSpec("none", 12, 60, VOCAB)))
    with pytest.raises(Exception, match="3 tokens came with 2 log-probs"):
        run.collect()
