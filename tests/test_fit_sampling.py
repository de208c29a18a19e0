"""What ends a response and what its text is, in whole fits and evaluations."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from changed_models import change_json, copy, with_own_code, with_special_tokens
from copris_testing import SomePrompts
from simulated_fits import build, ledger
from some_rewards import WritesDown
from transformers import AutoTokenizer

from copris_lightning import Evaluation, Sampling
from copris_lightning.engines.engine import Chunk, GenerationRequest
from copris_lightning.engines.simulated import LengthModel, SimulatedEngine
from copris_lightning.errors import ConfigurationError
from copris_lightning.quickstart.warm_start import character_tokenizer
from copris_lightning.rollout.decoding import ResponseDecoder


class Asked(SimulatedEngine):
    """Remembers its requests and whether it was started."""

    def __init__(self, median: float = 12.0) -> None:
        super().__init__(LengthModel(median, 1.0))
        self.requests: list[GenerationRequest] = []
        self.chunks: list[Chunk] = []
        self.started = False

    async def start(self, spec: Any) -> None:
        self.started = True
        await super().start(spec)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                self.chunks.append(chunk)
                yield chunk


def run(
    command: str, checkpoint: Path, directory: Path, *, median: float = 12.0, **settings: Any
) -> tuple[Any, Any, Asked]:
    trainer, module, data, _ = build(checkpoint, directory, **settings)
    data.engine = engine = Asked(median)
    result = getattr(trainer, command)(module, data)
    return trainer, result, engine


# -- what ends a response ------------------------------------------------------------------


def test_a_stop_string_ends_responses_and_is_seen(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen, stop = WritesDown(str(tmp_path / "seen")), ["7", "4", "x", "ab"]
    trainer, _, _ = run(
        "fit",
        tiny_checkpoint,
        tmp_path,
        data={"stop": stop, "reward": seen},
        median=60.0,
        max_steps=3,
    )
    records = ledger(tmp_path)
    by_string = [r["response"] for r in records if r["response"].endswith(tuple(stop))]
    assert len(by_string) > len(records) / 4
    for record in records:
        text = record["response"]
        assert not any(string in text[:-1] for string in stop)
        if text in by_string:
            assert record["finish_reason"] == "stop"
    assert set(by_string) <= set(seen.texts())
    assert trainer.logged_metrics["rollout/dropped_tokens"] == 0  # one token to a chunk here


def test_ends_that_only_the_config_has_end_responses(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = copy(tiny_checkpoint, tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").unlink()
    change_json(checkpoint / "config.json", eos_token_id=[1, 7])
    _, _, engine = run("fit", checkpoint, tmp_path, max_steps=1)
    assert {request.decoding.stop_token_ids for request in engine.requests} == {(1, 7)}


def test_tokens_of_the_users_own_end_responses_and_are_seen(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    token = tokenizer.convert_tokens_to_ids("7")
    _, _, engine = run(
        "fit", tiny_checkpoint, tmp_path, data={"stop_token_ids": [token]}, max_steps=2
    )
    assert {r.decoding.stop_token_ids for r in engine.requests} == {tuple(sorted((1, token)))}
    records = ledger(tmp_path)
    stopped = [r for r in records if r["response"].endswith("7")]
    assert {r["finish_reason"] for r in stopped} == {"stop"}
    # Of the model's own end nothing is seen; it counts as a token.
    own = [r for r in records if r["finish_reason"] == "stop" and r not in stopped]
    assert own
    assert not any(tokenizer.eos_token in r["response"] for r in records)


@pytest.mark.parametrize("token", [98, -1])
def test_a_stop_token_outside_the_vocabulary_is_refused_before_the_boot(
    tiny_checkpoint: Path, tmp_path: Path, token: int
) -> None:
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data={"stop_token_ids": [token]})
    data.engine = engine = Asked()
    with pytest.raises(ConfigurationError, match=rf"stop_token_ids=\[{token}\]: .* has 98"):
        trainer.fit(module, data)
    assert not engine.started
    assert not log


def test_a_tokenizer_that_knows_too_much_is_refused_before_the_boot(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = copy(tiny_checkpoint, tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(checkpoint)
    trainer, module, data, _ = build(checkpoint, tmp_path)
    data.engine = engine = Asked()
    with pytest.raises(ConfigurationError, match=r"99 tokens with ids up to 98, .* for 98"):
        trainer.fit(module, data)
    assert not engine.started


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sampling(stop=""), r"stop='' must be a list of strings"),
        (lambda: Sampling(stop="</answer>"), "must be a list of strings"),
        (lambda: Sampling(stop=["a", ""]), "'' cannot be looked for"),
        (lambda: Sampling(stop=["a\N{REPLACEMENT CHARACTER}"]), "cannot be looked for"),
        (lambda: Sampling(stop_token_ids=["7"]), r"stop_token_ids=\['7'\] must be a"),
        (lambda: Sampling(stop_token_ids=[True]), "must be a list of token ids"),
        (lambda: Sampling(max_new_tokens=0), r"max_new_tokens=0 must be at least 1"),
        (lambda: Sampling(top_p=0.0), r"top_p=0\.0 must be above 0"),
        (lambda: Sampling(top_p=float("nan")), "top_p=nan must be above 0"),
        (lambda: Sampling(top_p=1.1), "at most 1"),
        (lambda: Sampling(top_k=-1), r"top_k=-1 must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^.*{says}"):
        make()


# -- evaluation ----------------------------------------------------------------------------


def responses(
    checkpoint: Path,
    directory: Path,
    *,
    seed: int,
    sampling: Sampling | None = None,
    median: float = 30.0,
) -> list[Any]:
    evaluation = Evaluation(SomePrompts(6), "predict", sampling=sampling)
    _, batches, engine = run(
        "predict",
        checkpoint,
        directory,
        median=median,
        data={"evaluations": {"some": evaluation}, "seed": seed},
    )
    assert all(chunk.logprobs is None for chunk in engine.chunks)
    assert not any(request.decoding.logprobs for request in engine.requests)
    return [record for batch in batches for record in batch]


def test_greedy_evaluation_depends_on_no_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    greedy = [
        [
            r["response"]
            for r in responses(tiny_checkpoint, tmp_path, seed=s, sampling=Sampling(0.0))
        ]
        for s in (0, 1)
    ]
    assert greedy[0] == greedy[1]
    assert len(set(greedy[0])) == 6
    sampled = [
        [r["response"] for r in responses(tiny_checkpoint, tmp_path, seed=s)] for s in (0, 1)
    ]
    assert sampled[0] != sampled[1]


@pytest.mark.parametrize("limit", [5, 100])
def test_evaluation_has_limits_of_its_own(
    tiny_checkpoint: Path, tmp_path: Path, limit: int
) -> None:
    sampling = Sampling(max_new_tokens=limit, top_p=0.9, top_k=20)
    records = responses(tiny_checkpoint, tmp_path, seed=0, sampling=sampling, median=300.0)
    assert max(r["response_tokens"] for r in records) == limit  # training's is 48
    assert {r["finish_reason"] for r in records if r["response_tokens"] < limit} <= {"stop"}


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_evaluation_is_asked_for_as_set(
    tiny_checkpoint: Path, tmp_path: Path, command: str
) -> None:
    own = Sampling(0.0, max_new_tokens=7, top_p=0.5, top_k=3)
    commands = ("validate", "test", "predict")
    evaluations = {f"a-{on}": Evaluation(SomePrompts(4), on, sampling=own) for on in commands}
    data = {"evaluations": evaluations}
    options = {"max_steps": 1, "num_sanity_val_steps": 1, "limit_val_batches": 1}
    _, _, engine = run(command, tiny_checkpoint, tmp_path, data=data, **options)
    asked = {
        (*r.decoding.sampling.distribution.values(), r.decoding.logprobs)
        for r in engine.requests
        if r.request_id.startswith("evaluation")
    }
    assert asked == {(0.0, 0.5, 3, False)}
    training = [r.decoding for r in engine.requests if r.request_id.startswith("train")]
    assert bool(training) == (command == "fit")
    assert {(*d.sampling.distribution.values(), d.logprobs) for d in training} <= {
        (1.0, 1.0, 0, False)
    }


def test_the_longer_limit_counts_for_engine_and_context(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    evaluation = Evaluation(SomePrompts(4), sampling=Sampling(max_new_tokens=496))
    _, _, data, _ = build(tiny_checkpoint, tmp_path, data={"evaluations": {"long": evaluation}})
    assert data.settings.max_sequence_tokens == 16 + 496
    data.settings.check_model(512, vocabulary=99)
    name = r"evaluations\.long\.sampling\.max_new_tokens"
    with pytest.raises(ConfigurationError, match=rf"\+ {name}=496 = 512 exceeds"):
        data.settings.check_model(511, vocabulary=99)
    with pytest.raises(ConfigurationError, match=rf"^{name}=496 does not fit"):
        data.settings.check_model(400, vocabulary=99)


def test_many_greedy_samples_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^samples=4 with sampling\.temperature=0"):
        Evaluation(SomePrompts(4), samples=4, sampling=Sampling(0))


# -- the text of a response ----------------------------------------------------------------


def test_rewards_and_ledger_see_special_tokens(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = with_special_tokens(tiny_checkpoint, tmp_path / "special", "<think>", "</think>")
    seen = WritesDown(str(tmp_path / "seen"))
    run("fit", checkpoint, tmp_path, data={"reward": seen}, median=60.0, max_steps=2)
    texts = [record["response"] for record in ledger(tmp_path)]
    assert any("<think>" in text for text in texts)
    assert any("</think>" in text for text in texts)
    assert set(texts) <= set(seen.texts())
    assert not any("<|eos|>" in text for text in texts)


@pytest.fixture
def special(tiny_checkpoint: Path, tmp_path: Path) -> Any:
    path = with_special_tokens(tiny_checkpoint, tmp_path / "special", "<think>", "<s>")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = "<s>"
    return tokenizer


def test_only_what_is_not_said_is_left_out(special: Any) -> None:
    think, begin, a = special.convert_tokens_to_ids(["<think>", "<s>", "a"])
    end, padding = special.eos_token_id, special.pad_token_id
    own = 9
    decode = ResponseDecoder(special, ends=(end,))
    assert decode([think, a, end]) == "<think>a"
    assert decode([begin, padding, a, think, a, end, padding, padding]) == "a<think>a"
    inside = decode([a, begin, a])
    assert inside == "a<s>a"
    assert decode([a, own, end]) == "a" + special.decode([own])
    assert decode([end]) == decode([]) == decode([padding, end]) == ""
    assert decode([a, 98, 5000, a]) == "aa"
    assert decode.verbatim([think, a, end]).startswith("<think>a<")
    stripped = ResponseDecoder(special, ends=(end,), special_tokens="strip")
    assert stripped([begin, think, a, end]) == "a"


def test_text_is_not_tidied_up() -> None:
    tokenizer: Any = character_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = tokenizer.convert_tokens_to_ids(list("a . b ?"))
    assert tokenizer.decode(ids) == "a. b?"
    assert ResponseDecoder(tokenizer, ends=())(ids) == "a . b ?"


# -- code of the checkpoint's own ----------------------------------------------------------


def test_a_checkpoint_with_its_own_code_trains_and_resumes_once_it_is_trusted(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = with_own_code(tiny_checkpoint, tmp_path / "own")
    trust = {"trust_remote_code": True}
    trainer, module, data, log = build(own, tmp_path, model=trust, max_steps=2)
    trainer.fit(module, data)
    assert type(module.policy.model).__name__ == "OwnForCausalLM"
    assert log.count("sync 1") == 1
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    trainer, module, data, log = build(own, tmp_path, model=trust, max_steps=3)
    trainer.fit(module, data, ckpt_path=tmp_path / "saved.ckpt")
    assert {row["batch"] for row in ledger(tmp_path)} == {0, 1, 2}


def test_it_is_refused_while_it_is_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    own = with_own_code(tiny_checkpoint, tmp_path / "own")
    with pytest.raises(ConfigurationError, match="trust_remote_code=true"):
        build(own, tmp_path)
