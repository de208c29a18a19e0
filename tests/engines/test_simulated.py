"""The engine contract, lengths, times and tokens, as the simulated engine keeps them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from statistics import fmean, median

import pytest
import torch

from copris_lightning.engines.engine import (
    Decoding,
    Engine,
    EngineSpec,
    GenerationRequest,
    Load,
)
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import (
    Faults,
    LengthModel,
    StepTime,
    simulate_token,
)
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError

VOCAB = 50
STOP = 3


def spec(**settings):
    return EngineSpec(
        **{"model": "none", "max_num_seqs": 8, "max_model_len": 200, "vocab_size": VOCAB} | settings
    )


def request(stop_token_ids=(STOP,), **settings):
    return GenerationRequest(
        **{
            "request_id": "r0",
            "token_ids": (10, 11),
            "max_new_tokens": 30,
            "decoding": Decoding(stop_token_ids=stop_token_ids),
            "seed": 7,
        }
        | settings
    )


async def started(engine=None, **settings):
    engine = engine or SimulatedEngine()
    await engine.start(spec(**settings))
    await engine.release(0)
    return engine


async def chunks_of(engine, asked):
    async with aclosing(engine.stream(asked)) as chunks:
        return [chunk async for chunk in chunks]


async def tokens_of(engine, asked):
    return [token for chunk in await chunks_of(engine, asked) for token in chunk.token_ids]


# -- lengths and times ---------------------------------------------------------------------


def test_means_are_lognormal_around_the_median():
    means = [LengthModel(24.0, 1.0).mean(seed) for seed in range(4000)]
    assert median(means) == pytest.approx(24.0, rel=0.1)
    assert fmean(means) == pytest.approx(24.0 * 2.718281828**0.5, rel=0.15)
    assert max(means) > 10 * 24.0


def test_without_spread_all_means_are_the_median():
    assert {LengthModel(24.0, 0.0).mean(seed) for seed in range(50)} == {24.0}


def test_responses_have_the_mean_length_of_the_model(loop):
    async def lengths():
        engine = await started(SimulatedEngine(LengthModel(10.0, 0.0)), max_num_seqs=1000)
        asked = [request(request_id=f"r{i}", seed=i, max_new_tokens=10_000) for i in range(1000)]
        responses = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
        await engine.close()
        return list(map(len, responses))

    # The mean of a thousand geometric lengths: standard error 0.3.
    assert fmean(loop.run_until_complete(lengths())) == pytest.approx(10.0, abs=1.2)


def test_a_step_takes_a_constant_and_a_share_per_request():
    assert StepTime(0.02, 0.0002)(1) == pytest.approx(0.0202)
    assert StepTime(0.02, 0.0002)(100) == pytest.approx(0.04)


async def time_for(requests, slots):
    """Virtual seconds for so many responses of 20 tokens, at 1 + 0.25 b per step."""
    engine = await started(SimulatedEngine(step_time=StepTime(1.0, 0.25)), max_num_seqs=slots)
    asked = [
        request(request_id=f"r{i}", seed=i, max_new_tokens=20, stop_token_ids=())
        for i in range(requests)
    ]
    made = await asyncio.gather(*(tokens_of(engine, one) for one in asked))
    assert [len(tokens) for tokens in made] == [20] * requests
    seconds = asyncio.get_running_loop().time()
    await engine.close()
    return seconds


@pytest.mark.parametrize("requests", [1, 8])
def test_each_step_makes_one_token_for_each_request(loop, requests):
    seconds = loop.run_until_complete(time_for(requests, slots=8))
    assert seconds == pytest.approx(20 * (1.0 + 0.25 * requests))


def test_requests_beyond_the_slots_wait_their_turn(loop):
    seconds = loop.run_until_complete(time_for(16, slots=8))
    assert 2 * 20 * 3.0 <= seconds < 2 * 20 * 3.0 + 2 * 3.0


# -- tokens --------------------------------------------------------------------------------


def test_a_token_depends_on_the_version_the_seed_and_every_token_before():
    def token(version=1, kv_version=1, prefix=(1, 2, 3, 4), seed=5):
        return simulate_token(version, kv_version, prefix, seed, vocab_size=10**6, stop=0, mean=1e9)

    others = [
        token(version=2, kv_version=2),
        token(version=2),
        token(kv_version=0),
        token(seed=6),
        token(prefix=(1, 2, 3)),
    ]
    others += [token(prefix=(9, 2, 3, 4)), token(prefix=(1, 9, 3, 4)), token(prefix=(2, 1, 3, 4))]
    assert token() == token()
    assert len({token(), *others}) == 9


def test_the_engine_makes_the_tokens_that_simulate_token_gives(loop):
    async def response():
        engine = await started()
        await engine.hold()
        await engine.release(4)
        result = await chunks_of(engine, request())
        await engine.close()
        return result, engine.lengths.mean(7)

    chunks, mean = loop.run_until_complete(response())
    prefix = [10, 11]
    for chunk in chunks:
        expected = simulate_token(4, 4, prefix, 7, vocab_size=VOCAB, stop=STOP, mean=mean)
        assert (*chunk.token_ids, *chunk.logprobs) == expected
        assert chunk.version == 4
        prefix += chunk.token_ids
    assert len(prefix) > 2


def test_a_resumed_response_is_the_uncut_one(loop):
    async def cut_anywhere():
        engine = await started()
        whole = await tokens_of(engine, request(seed=2))
        for cut in range(1, len(whole)):
            resumed = request(
                request_id=f"cut{cut}",
                seed=2,
                token_ids=(10, 11, *whole[:cut]),
                max_new_tokens=30 - cut,
            )
            assert whole[:cut] + await tokens_of(engine, resumed) == whole
        await engine.close()
        return len(whole)

    assert loop.run_until_complete(cut_anywhere()) > 5


def test_tokens_are_in_the_vocabulary_and_logprobs_below_zero():
    for seed in range(3000):
        token, logprob = simulate_token(0, 0, (1,), seed, vocab_size=5, stop=2, mean=4.0)
        assert 0 <= token < 5
        assert -4.0 <= logprob < 0
    drawn = {simulate_token(0, 0, (1,), s, vocab_size=5, stop=2, mean=1e12)[0] for s in range(300)}
    assert drawn == {0, 1, 3, 4}


def test_a_response_ends_with_its_stop_token_or_its_budget(loop):
    async def endings():
        engine = await started(SimulatedEngine(LengthModel(8.0, 0.5)), max_num_seqs=100)
        asked = [request(request_id=f"r{i}", seed=i, max_new_tokens=10) for i in range(100)]
        result = await asyncio.gather(*(chunks_of(engine, one) for one in asked))
        await engine.close()
        return result

    reasons = set()
    for chunks in loop.run_until_complete(endings()):
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        assert STOP not in tokens[:-1]
        assert len(tokens) <= 10
        assert [chunk.ending for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].ending == ("stop" if tokens[-1] == STOP else "length")
        reasons.add(chunks[-1].ending)
    assert reasons == {"stop", "length"}


def test_without_stop_tokens_a_response_uses_its_whole_budget(loop):
    async def response():
        engine = await started(SimulatedEngine(LengthModel(1.0, 0.0)))
        made = await tokens_of(engine, request(max_new_tokens=60, stop_token_ids=()))
        await engine.close()
        return made

    assert len(loop.run_until_complete(response())) == 60


def test_faults_change_the_chunks_but_not_the_tokens(loop):
    async def responses():
        result = []
        for faults in (Faults(), Faults(empty_chunk_rate=0.5, late_finish_rate=1.0)):
            engine = await started(SimulatedEngine(faults=faults))
            result.append([await chunks_of(engine, request(seed=seed)) for seed in range(20)])
            await engine.close()
        return result

    plain, odd = loop.run_until_complete(responses())
    for straight, crooked in zip(plain, odd, strict=True):
        assert [t for c in straight for t in c.token_ids] == [
            t for c in crooked for t in c.token_ids
        ]
        assert all(chunk.token_ids for chunk in straight)
        assert not crooked[-1].token_ids
        assert crooked[-1].ending == straight[-1].ending
    assert sum(not c.token_ids for chunks in odd for c in chunks[:-1]) > 20


# -- the contract --------------------------------------------------------------------------


def test_it_is_an_engine_that_lives_on_virtual_time():
    engine = SimulatedEngine()
    assert isinstance(engine, Engine)
    loop = engine.new_event_loop()
    assert isinstance(loop, VirtualClockLoop)
    loop.close()


def test_one_token_alone_cannot_be_drawn_from(loop):
    with pytest.raises(ConfigurationError, match="tokenizer knows 1 tokens"):
        loop.run_until_complete(SimulatedEngine().start(spec(vocab_size=1)))


def test_generating_before_the_start_is_refused(loop):
    with pytest.raises(EngineError, match="not running"):
        loop.run_until_complete(chunks_of(SimulatedEngine(), request()))


def test_a_request_id_in_use_is_refused_and_free_again_afterwards(loop):
    async def twice():
        engine = await started()
        async with aclosing(engine.stream(request())) as first:
            await anext(first)
            with pytest.raises(EngineError, match="'r0' is in use"):
                await chunks_of(engine, request())
        again = await chunks_of(engine, request())
        await engine.close()
        return again

    assert loop.run_until_complete(twice())


def test_cancelling_the_consumer_ends_the_request(loop):
    async def cancelled():
        engine = await started()
        asked = request(max_new_tokens=10_000, stop_token_ids=())
        consumer = asyncio.create_task(chunks_of(engine, asked))
        await asyncio.sleep(1.0)
        consumer.cancel()
        await asyncio.wait([consumer])
        made = engine.tokens_made
        await asyncio.sleep(100.0)
        assert engine.load() == Load(0, 0)
        await engine.close()
        return consumer.cancelled(), made, engine.tokens_made

    was_cancelled, before, after = loop.run_until_complete(cancelled())
    assert was_cancelled
    assert before == after > 0


def test_weights_are_gone_through_and_refused_by_an_engine_that_runs(loop):
    passes = []

    def weights():
        for name in "ab":
            passes.append(name)
            yield name, torch.zeros(1)

    async def sync():
        engine = await started()
        transport = engine.transport(0, asyncio.run)
        with pytest.raises(WeightSyncError, match="not held"):
            transport.send(weights)
        assert not passes
        await engine.hold()
        transport.send(weights)
        assert transport.explain(weights) == ""
        await engine.close()

    loop.run_until_complete(sync())
    assert passes == ["a", "b"]


def test_it_has_no_model_to_score_with(loop):
    assert loop.run_until_complete(SimulatedEngine().score([[1, 2]])) is None


def test_death_reaches_every_request_and_all_later_ones(loop):
    async def dying():
        engine = await started(SimulatedEngine(faults=Faults(die_after_tokens=10)))
        asked = [request(request_id=f"r{i}", seed=i, stop_token_ids=()) for i in range(4)]
        results = await asyncio.gather(
            *(chunks_of(engine, one) for one in asked), return_exceptions=True
        )
        assert engine.tokens_made == 10
        with pytest.raises(EngineError, match="not running"):
            await chunks_of(engine, request())
        await engine.close()
        return results

    results = loop.run_until_complete(dying())
    assert [str(error) for error in results] == ["the simulated engine died, as told to"] * 4


@pytest.mark.parametrize("busy", [False, True])
def test_closing_twice_is_fine_and_leaves_no_task(loop, busy):
    async def closing():
        engine = await started()
        if busy:
            async with aclosing(engine.stream(request())) as chunks:
                await anext(chunks)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineError, match="not running"):
            await chunks_of(engine, request())
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert loop.run_until_complete(closing()) == set()


def test_closing_an_engine_that_never_started_is_fine(loop):
    loop.run_until_complete(SimulatedEngine().close())
