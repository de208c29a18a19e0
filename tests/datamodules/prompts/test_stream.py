"""The tokens of prompts, and the stream that training draws on."""

from __future__ import annotations

import json

import pytest

from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptStream
from copris_lightning.errors import ConfigurationError
from copris_lightning.quickstart.warm_start import character_tokenizer
from copris_lightning.rollout.rewards import Prompt

KEY = "task.prompts"


class ListedPrompts:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Prompt(f"id{index}", text=str(index))


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def encode(tokenizer):
    return PromptEncoder(tokenizer, max_prompt_tokens=20, key=KEY)


def taken(stream, count):
    return [stream.next().index for _ in range(count)]


# -- the stream ----------------------------------------------------------------------------


def test_every_epoch_is_another_permutation(encode):
    stream = PromptStream(ListedPrompts(30), encode, seed=5)
    epochs = [taken(stream, 30) for _ in range(4)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert list(range(30)) not in epochs


def test_the_order_is_the_seeds(encode):
    orders = [taken(PromptStream(ListedPrompts(30), encode, seed=seed), 60) for seed in (5, 5, 6)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


def test_an_epoch_of_one_seed_is_no_epoch_of_the_next_seed(encode):
    first, second = (PromptStream(ListedPrompts(30), encode, seed=seed) for seed in (0, 1))
    epochs = [[tuple(taken(stream, 30)) for _ in range(5)] for stream in (first, second)]
    assert not set(epochs[0]) & set(epochs[1])


def test_without_a_seed_the_order_is_the_sources(encode):
    assert taken(PromptStream(ListedPrompts(4), encode), 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(("seed", "epochs"), [(None, 1), (3, 1), (3, 2)])
def test_a_finite_stream_ends_and_stays_ended(encode, seed, epochs):
    stream = PromptStream(ListedPrompts(7), encode, seed=seed, epochs=epochs)
    assert sorted(taken(stream, 7 * epochs)) == sorted(list(range(7)) * epochs)
    assert [stream.next() for _ in range(3)] == [None] * 3


@pytest.mark.parametrize("before", [0, 1, 6, 7, 8, 20])
def test_a_restored_stream_goes_on_exactly_where_it_was(encode, before):
    stream = PromptStream(ListedPrompts(7), encode, seed=1)
    taken(stream, before)
    state = json.loads(json.dumps(stream.state_dict()))
    restored = PromptStream(ListedPrompts(7), encode, seed=1)
    restored.load_state_dict(state)
    assert taken(restored, 25) == taken(stream, 25)


def test_a_restored_finite_stream_ends_at_the_same_place(encode):
    stream = PromptStream(ListedPrompts(7), encode, seed=1, epochs=1)
    taken(stream, 5)
    restored = PromptStream(ListedPrompts(7), encode, seed=1, epochs=1)
    restored.load_state_dict(stream.state_dict())
    assert len(taken(restored, 2)) == 2
    assert restored.next() is None


def test_going_through_all_prompts_does_not_move_the_stream(encode):
    stream = PromptStream(ListedPrompts(5), encode, seed=1)
    assert [queued.index for queued in stream] == [0, 1, 2, 3, 4]
    assert stream.state_dict() == {"taken": 0}


def test_chosen_indices_are_all_there_is(encode):
    stream = PromptStream(ListedPrompts(9), encode, seed=1, indices=[2, 5, 8])
    assert len(stream) == 3
    assert sorted(taken(stream, 3)) == [2, 5, 8]
    assert stream.prompt(7).id == "id7"


def test_a_queued_prompt_carries_its_tokens(encode, tokenizer):
    queued = list(PromptStream(ListedPrompts(50), encode))[42]
    assert queued.index == 42
    assert queued.prompt == Prompt("id42", text="42")
    assert queued.token_ids == tuple(tokenizer("42")["input_ids"])


@pytest.mark.parametrize(("count", "indices"), [(0, None), (3, [])])
def test_no_prompts_is_an_error_with_the_key(encode, count, indices):
    with pytest.raises(ConfigurationError, match=r"evaluations.some.prompts: .*empty"):
        PromptStream(ListedPrompts(count), encode, indices=indices, key="evaluations.some.prompts")


# -- encoding ------------------------------------------------------------------------------


def test_text_is_encoded_as_it_is(encode, tokenizer):
    ids = encode(Prompt("a", text="3+4= "))
    assert isinstance(ids, tuple)
    assert tokenizer.decode(ids) == "3+4= "


def test_a_chat_prompt_goes_through_the_template(tokenizer, encode):
    messages = ({"role": "user", "content": "3+"}, {"role": "user", "content": "4="})
    assert tokenizer.decode(encode(Prompt("a", messages=messages))) == "3+4="


def test_the_template_adds_the_generation_prompt(tokenizer):
    templated = character_tokenizer()
    templated.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    encode = PromptEncoder(templated, max_prompt_tokens=20, key=KEY)
    ids = encode(Prompt("a", messages=({"role": "user", "content": "hi"},)))
    assert templated.decode(ids) == "hiA:"


def test_a_chat_prompt_has_one_begin_token_though_the_tokenizer_adds_one_too():
    from tokenizers.processors import TemplateProcessing

    templated = character_tokenizer()
    templated.add_special_tokens({"bos_token": "<|bos|>"})
    templated.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", templated.bos_token_id)]
    )
    templated.chat_template = "<|bos|>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encode = PromptEncoder(templated, max_prompt_tokens=20, key=KEY)
    text = encode(Prompt("a", text="hi"))
    chat = encode(Prompt("a", messages=({"role": "user", "content": "hi"},)))
    assert text.count(templated.bos_token_id) == 1
    assert chat == text


def test_a_chat_prompt_without_a_template_says_what_to_do():
    plain = character_tokenizer()
    plain.chat_template = None
    encode = PromptEncoder(plain, max_prompt_tokens=20, key=KEY)
    with pytest.raises(ConfigurationError) as caught:
        encode(Prompt("a7", messages=({"role": "user", "content": "hi"},)))
    for part in (KEY, "'a7'", "chat template"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "prompt",
    [Prompt("a7"), Prompt("a7", text="x", messages=({"role": "user", "content": "x"},))],
    ids=["neither", "both"],
)
def test_a_prompt_is_either_text_or_messages(encode, prompt):
    with pytest.raises(ConfigurationError, match=f"{KEY}: prompt 'a7' needs either"):
        encode(prompt)


def test_an_empty_prompt_is_refused(encode):
    with pytest.raises(ConfigurationError, match=f"{KEY}: prompt 'a7' is empty"):
        encode(Prompt("a7", text=""))


def test_the_longest_prompt_that_is_let_through_has_the_limits_length(encode):
    assert len(encode(Prompt("a", text="x" * 20))) == 20
    with pytest.raises(ConfigurationError) as caught:
        encode(Prompt("a7", text="x" * 21))
    for part in (
        KEY,
        "'a7' has 21 tokens",
        "task.max_prompt_tokens=20",
        "task.skip_long_prompts=true",
    ):
        assert part in str(caught.value)
