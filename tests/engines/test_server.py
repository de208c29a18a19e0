"""Remote engines on two real servers: tokens, log-probs, and who is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from responses import PROMPT, STOP, assert_made_by, generate, several
from served import Served

from copris_lightning import VLLMServerEngine
from copris_lightning.errors import EngineError

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers' boot

Connected = tuple[VLLMServerEngine, Callable[..., Any]]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_logprobs_are_those_of_the_sampled_distribution(
    connected: Connected, model: Any, temperature: float
) -> None:
    engine, call = connected
    responses = call(several(engine, 4, temperature=temperature))
    assert [(len(ids), reason) for ids, _, reason in responses] == [(60, "length")] * 4
    assert_made_by(model, responses, temperature=temperature)


def test_a_stop_token_ends_the_response_and_is_part_of_it(connected: Connected, model: Any) -> None:
    engine, call = connected
    response = call(generate(engine, PROMPT, n=200, stop=tuple(range(50))))
    ids, _, reason = response
    assert reason == "stop"
    assert ids[-1] < 50
    assert all(token >= 50 for token in ids[:-1])
    assert_made_by(model, [response])


def test_the_end_of_sequence_ends_nothing_unless_asked_for(connected: Connected) -> None:
    engine, call = connected
    responses = call(several(engine, 16, n=200))
    assert {reason for _, _, reason in responses} == {"length"}
    assert any(STOP in ids[:-1] for ids, _, _ in responses)


def test_requests_go_to_the_server_with_the_fewest(connected: Connected) -> None:
    engine, call = connected
    seen: list[list[int]] = []

    async def watch() -> None:
        await several(
            engine, 8, on_chunk=lambda: seen.append([s.in_flight for s in engine.servers])
        )

    call(watch())
    assert seen[0] == [4, 4]
    assert [server.in_flight for server in engine.servers] == [0, 0]


def test_seeded_requests_are_the_same_on_any_server(connect: Callable[..., Connected]) -> None:
    engine, call = connect(request_seeds=True)
    responses = call(several(engine, 4, seed=7))
    assert len({tuple(ids) for ids, _, _ in responses}) == 1
    assert call(generate(engine, PROMPT, seed=8))[0] != responses[0][0]


def test_an_aborted_request_is_not_generated_any_further(
    connected: Connected, servers: list[Served]
) -> None:
    engine, call = connected
    many, tokens = 48, 240

    def generated() -> float:
        return sum(server.metric("vllm:generation_tokens_total") for server in servers)

    async def abort_at_the_first_token() -> None:
        tasks: list[asyncio.Task[Any]] = []

        def abort() -> None:
            for task in tasks:
                task.cancel()

        tasks += [
            asyncio.create_task(generate(engine, (5, i), n=tokens, on_chunk=abort))
            for i in range(many)
        ]
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)

    def tokens_of_one_try() -> float:
        before = generated()
        call(abort_at_the_first_token())
        assert [server.in_flight for server in engine.servers] == [0, 0]
        deadline = time.monotonic() + 60
        while any(server.metric("vllm:num_requests_running") for server in servers):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return generated() - before

    # A server that gets no processor for a second can end its responses before it reads of the
    # abort; one that is never told generates all of them, every time.
    assert any(tokens_of_one_try() < 0.5 * many * tokens for _ in range(5))


def test_requests_that_a_server_refuses_are_named(connected: Connected) -> None:
    engine, call = connected
    with pytest.raises(EngineError, match=r"http://127.* answers 400: The decoder prompt"):
        call(generate(engine, tuple(range(2, 90)) * 3, n=10))
