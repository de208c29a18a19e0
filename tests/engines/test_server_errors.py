"""Remote engines against servers that are wrong, or go wrong; played by a small HTTP server."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import unused_port
from fake_server import GENERATE, SPEC, Fake, Part, generate, nothing, run
from synced import sync

from copris_lightning.core.sampling import Sampling
from copris_lightning.engines import server_client
from copris_lightning.engines.engine import Chunk, Decoding, EngineSpec, GenerationRequest
from copris_lightning.engines.server import VLLMServerEngine
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError

# -- servers that are wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (Fake(model="other"), r"serves \['other', 'x'\], not model='some/model'"),
        (Fake(max_model_len=99), r"takes 99 tokens, 100 are needed .* \(--max-model-len\)"),
        (Fake(logprobs_mode="raw_logprobs"), "returns raw_logprobs, not those of the sampled"),
        (Fake(broken={"/collective_rpc": 404, "describe": 404}), "refuses a request.* 404"),
        (Fake(broken={"describe": 500}), "refuses a request.* 500"),
        (Fake(broken={GENERATE: 403}), "refuses a request.* 403"),
    ],
    ids=["model", "length", "raw", "no development routes", "no extension", "no scale-out"],
)
def test_a_server_that_was_not_started_for_the_run_is_named_with_what_to_do(
    fake: Fake, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        run([fake, Fake()], nothing)
    text = str(error.value)
    assert text.startswith(f"urls: {fake.url} ")
    port = fake.url.rpartition(":")[2]
    assert f"start it with `copris serve --model some/model --port {port}`" in text


def test_a_server_that_is_not_there_is_named() -> None:
    url = f"http://127.0.0.1:{unused_port()}"

    async def start() -> None:
        await VLLMServerEngine([url]).start(SPEC)

    with pytest.raises(ConfigurationError, match=rf"^urls: {url} does not answer; start it with"):
        asyncio.run(start())


def test_a_server_that_is_something_else_is_named() -> None:
    class Page(Fake):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            return web.Response(text="<html>")

    with pytest.raises(ConfigurationError, match="is no vLLM server"):
        run([Page()], nothing)


def test_a_directory_that_a_server_does_not_see_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"sync_directory='{tmp_path}'.* does not see"):
        run([Fake(sees_file=False)], nothing, sync_directory=str(tmp_path))


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="set VLLM_API_KEY to its key"):
        run([Fake(key="secret")], nothing)
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    run([Fake(key="secret")], nothing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": []}, r"urls=\[\] names no server"),
        ({"urls": ["127.0.0.1:8000"]}, r"urls: '127.0.0.1:8000' is no URL"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "urls=.* names a server twice"),
        ({"urls": ["http://a:1"], "stall_timeout_s": 0}, "stall_timeout_s=0 must be a number"),
        (
            {"urls": ["http://a:1"], "sync_directory": "/no/such"},
            "sync_directory=./no/such.: cannot write",
        ),
    ],
)
def test_settings_are_checked_before_anyone_is_contacted(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{message}"):
        VLLMServerEngine(**settings).validate(SPEC)


def test_a_cap_beyond_the_files_that_may_be_open_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cap of 999999999 .* run `ulimit -n"):
        VLLMServerEngine(["http://a:1"]).validate(EngineSpec("m", 999_999_999, 100, 98))


def test_a_cap_that_follows_what_servers_do_not_tell_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^flow\.cap=\{least: 4, most: 8\} follows"):
        VLLMServerEngine(["http://a:1"]).validate(EngineSpec("m", 8, 100, 98, min_num_seqs=4))


def test_a_cap_beyond_what_the_servers_generate_at_once_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = EngineSpec("some/model", 33, 100, 98)

    async def again(engine: VLLMServerEngine) -> None:
        await engine.start(spec)

    run([Fake(), Fake()], again)
    assert "cap=33" in caplog.text
    assert "generate 32 at once" in caplog.text


# -- servers that go wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    "end", ["cut", "out of memory", ([], "abort")], ids=["cut", "error", "abort"]
)
def test_a_response_goes_on_elsewhere_from_its_last_token(end: Part) -> None:
    dying = Fake(parts=[[([10, 11], None), ([12], None), end]])
    other = Fake(parts=[[([13], None), ([1], "stop")]])
    chunks = run([dying, other], generate)
    assert [token for chunk in chunks for token in chunk.token_ids] == [10, 11, 12, 13, 1]
    assert [x for c in chunks for x in c.logprobs] == [-10.0, -11.0, -12.0, -13.0, -1.0]
    assert [chunk.ending for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk.version for chunk in chunks} == {0}
    assert dying.requests[0]["token_ids"] == [3, 4]
    assert dying.requests[0]["sampling_params"]["max_tokens"] == 10
    assert other.requests[0]["token_ids"] == [3, 4, 10, 11, 12]
    assert other.requests[0]["sampling_params"]["max_tokens"] == 7


def test_servers_are_asked_as_the_request_says() -> None:
    async def evaluate(engine: VLLMServerEngine) -> list[Chunk]:
        decoding = Decoding(Sampling(0.0, top_p=0.9, top_k=5), (1,), logprobs=False)
        request = GenerationRequest("name", (3, 4), 10, decoding, seed=5)
        return [chunk async for chunk in engine.stream(request)]

    asked = []
    for work in (generate, evaluate):
        fake = Fake(parts=[[([10], None), ([1], "stop")]])
        chunks = run([fake], work)
        params = fake.requests[0]["sampling_params"]
        names = ("temperature", "top_p", "top_k", "logprobs")
        asked.append([*(params[name] for name in names), chunks[0].logprobs])
    assert asked == [[1.0, 1.0, 0, 0, (-10.0,)], [0.0, 0.9, 5, None, None]]


def test_a_resent_response_does_not_repeat_its_random_numbers() -> None:
    fakes = [Fake(parts=[[([10], None), "cut"]]), Fake(parts=[[([1], "stop")]])]
    run(fakes, generate, request_seeds=True)
    assert [fake.requests[0]["sampling_params"]["seed"] for fake in fakes] == [7, 8]


def test_when_no_server_is_left_all_are_named() -> None:
    fakes = [Fake(parts=[["cut"]]), Fake(parts=[["no memory"]])]
    with pytest.raises(EngineError, match=r"no server .* is left") as error:
        run(fakes, generate)
    assert all(fake.url in str(error.value) for fake in fakes)
    assert "no memory" in str(error.value)


def test_a_refused_request_loses_no_server() -> None:
    async def refused(engine: VLLMServerEngine) -> None:
        fake.broken[GENERATE] = 400
        with pytest.raises(EngineError, match=r"400: as it was told to"):
            await generate(engine)
        assert engine.servers[0].lost is None

    fake = Fake()
    run([fake], refused)


@pytest.mark.parametrize("route", ["/update_weight_version", "/reset_prefix_cache", "/pause"])
def test_a_server_that_fails_at_a_hold_or_a_release_is_left_out(route: str) -> None:
    async def hold_and_release(engine: VLLMServerEngine) -> None:
        fakes[0].broken[route] = 500
        await engine.hold()
        await engine.release(1)
        assert [server.lost is None for server in engine.servers] == [False, True]
        assert engine.version == 1

    fakes = [Fake(), Fake()]
    run(fakes, hold_and_release)


@pytest.mark.parametrize("held", [True, False])
def test_a_server_that_is_held_with_its_responses_may_be_silent(held: bool) -> None:
    silent = Fake(parts=[[([5], None), 3.0, ([6], "length")]])

    async def work(engine: VLLMServerEngine) -> list[int]:
        tokens: list[int] = []
        request = GenerationRequest("name", (3, 4), 2, Decoding(), seed=5)
        async for chunk in engine.stream(request):
            tokens += chunk.token_ids
            if held and len(tokens) == 1:
                await engine.hold(keep=True)
        return tokens

    if held:
        assert run([silent], work, stall_timeout_s=1.0) == [5, 6]
    else:
        with pytest.raises(EngineError, match=r"was silent for 1 s"):
            run([silent], work, stall_timeout_s=1.0)


def test_a_logprob_that_json_cannot_hold_is_not_a_number() -> None:
    chunks = run([Fake(parts=[[([9999, 1], "stop")]])], generate)
    assert math.isnan(chunks[0].logprobs[0])
    assert chunks[0].logprobs[1] == -1.0


def test_a_dead_server_is_probed_no_more_and_the_others_take_turns() -> None:
    async def score(engine: VLLMServerEngine) -> None:
        fakes[1].broken[GENERATE] = 503
        assert await engine.score([[2, 3]] * 3) == [[-3.0]] * 3
        assert "503" in (engine.servers[1].lost or "")
        for fake in fakes:
            fake.calls.clear()
        assert await engine.score([[2, 3]] * 3) == [[-3.0]] * 3
        assert await engine.score([[2, 3]]) == [[-3.0]]
        assert [len(fake.calls) for fake in fakes] == [2, 0, 2]

    fakes = [Fake(), Fake(), Fake()]
    run(fakes, score)


WEIGHTS = [("w", torch.zeros(2))]


def caller() -> Callable[..., Any]:
    """Runs coroutines on this loop, from another thread."""
    loop = asyncio.get_running_loop()
    return lambda work: asyncio.run_coroutine_threadsafe(work, loop).result()


async def load(engine: VLLMServerEngine, version: int) -> None:
    await asyncio.to_thread(sync, engine, caller(), WEIGHTS, version)


@pytest.mark.parametrize("healthy", [True, False])
def test_a_failed_load_is_an_error_unless_the_server_is_dead(healthy: bool) -> None:
    async def sync(engine: VLLMServerEngine) -> None:
        fakes[0].broken["load_shard"] = 500
        if not healthy:
            fakes[0].broken["/health"] = 503
            await load(engine, 1)
            assert [s.lost is None for s in engine.servers] == [False, True]
            assert engine.version == 1
            fakes[0].broken.clear()
            await load(engine, 2)
            assert [s.lost for s in engine.servers] == [None, None]
        else:
            with pytest.raises(WeightSyncError, match="could not load the weights"):
                await load(engine, 1)
            assert engine.version == 0
        for fake in fakes:  # whatever happened, nobody is left paused
            paused = [call for call in fake.calls if call in ("/pause", "/resume")]
            assert paused[-1] == "/resume"

    fakes = [Fake(), Fake()]
    run(fakes, sync)


@pytest.mark.parametrize(
    ("report", "found"),
    [
        ({"stale": ["lm_head.weight"], "missing": [], "unused": []}, "sent for lm_head.weight"),
        (None, "another version of this package"),
    ],
)
def test_weights_that_did_not_arrive_on_one_of_the_servers_end_the_run(
    report: Any, found: str
) -> None:
    async def sync(engine: VLLMServerEngine) -> None:
        fakes[1].arrival = report
        with pytest.raises(WeightSyncError, match=rf"did not arrive at {engine.urls[1]}.*{found}"):
            await load(engine, 1)

    fakes = [Fake(), Fake()]
    run(fakes, sync)


def test_weights_and_probes_leave_no_file_behind(tmp_path: Path) -> None:
    class Looking(Fake):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            seen.append(len(os.listdir(tmp_path)))
            return await super().answer(request)

    async def sync(engine: VLLMServerEngine) -> None:
        await engine.hold()
        transport = engine.transport(0, caller())
        await asyncio.to_thread(transport.send, lambda: iter(WEIGHTS))
        answer = await asyncio.to_thread(transport.explain, lambda: iter(WEIGHTS))
        assert answer == f"{engine.urls[0]}: all is well"
        transport.close()

    seen: list[int] = []
    run([Looking()], sync, sync_directory=str(tmp_path))
    assert max(seen) == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("others", [1, 0])
def test_a_server_whose_engine_dies_in_a_load_is_not_waited_for(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_client, "_LOOK_EVERY_S", 0.05)
    fakes = [Fake(silent=True), *(Fake() for _ in range(others))]

    async def sync(engine: VLLMServerEngine) -> None:
        await load(engine, 1)

    if others:
        run(fakes, sync)
        assert fakes[1].calls[-1] == "/resume"
    else:
        with pytest.raises(EngineError, match=r"is left: .*: its engine died while it was called"):
            run(fakes, sync)


def test_a_servers_error_is_told_in_its_own_words() -> None:
    with pytest.raises(ConfigurationError, match=r"answers 500: as it was told to\)$"):
        run([Fake(broken={"describe": 500})], nothing)
