"""Data sets of prompts, their tokens, and the stream that training draws on."""

from __future__ import annotations

import json

import datasets
import pytest

from copris_lightning.datamodules.prompts import DatasetPrompts, PromptEncoder, PromptStream
from copris_lightning.errors import ConfigurationError
from copris_lightning.quickstart.warm_start import character_tokenizer
from copris_lightning.rollout.rewards import Prompt

KEY = "data.init_args.prompts"


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
    with pytest.raises(ConfigurationError, match=r"data.init_args.val_prompts: .*empty"):
        PromptStream(
            ListedPrompts(count), encode, indices=indices, key="data.init_args.val_prompts"
        )


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
    for part in (KEY, "'a7'", "model.init_args.model", "chat template"):
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
    assert encode.fits(Prompt("a", text="x" * 20))
    assert not encode.fits(Prompt("a", text="x" * 21))
    with pytest.raises(ConfigurationError) as caught:
        encode(Prompt("a7", text="x" * 21))
    for part in (
        KEY,
        "'a7' has 21 tokens",
        "data.init_args.max_prompt_tokens=20",
        "data.init_args.skip_long_prompts=true",
    ):
        assert part in str(caught.value)


# -- data sets -----------------------------------------------------------------------------

ROWS = [
    {"prompt": "1+1=", "answer": "2", "name": "one", "level": 1},
    {"prompt": "2+2=", "answer": "4", "name": "two", "level": 2},
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows to a file; nothing is cached outside the test's folder, nor fetched."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)

    def rows_to_file(rows=ROWS, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return rows_to_file


def load(path, **settings):
    return DatasetPrompts("json", data_files=path, **settings)


def test_rows_become_prompts_with_the_other_columns_as_extra(write):
    prompts = load(write())
    assert len(prompts) == 2
    assert prompts[1] == Prompt(
        "00000001", text="2+2=", answer="4", extra={"name": "two", "level": 2}
    )
    assert prompts[1] == prompts[1]


def test_several_files_are_read_one_after_another(write):
    prompts = load([write(ROWS[:1], "a.jsonl"), write(ROWS[1:], "b.jsonl")])
    assert [prompts[i].text for i in range(len(prompts))] == ["1+1=", "2+2="]


def test_columns_are_chosen_by_name(write):
    rows = [{"question": "q", "solution": 7, "uid": 12}]
    prompts = load(write(rows), prompt_column="question", answer_column="solution", id_column="uid")
    assert prompts[0] == Prompt("12", text="q", answer=7, extra={})


def test_a_data_set_without_answers_is_fine_if_told_so(write):
    prompts = load(write([{"prompt": "q"}]), answer_column=None)
    assert prompts[0] == Prompt("00000000", text="q", answer=None)


def test_the_instruction_is_appended_to_the_text(write):
    assert load(write(), instruction=" Think.")[0].text == "1+1= Think."


def test_text_can_be_wrapped_as_a_user_message(write):
    prompt = load(write(), as_chat=True, instruction="!")[0]
    assert prompt.text is None
    assert prompt.messages == ({"role": "user", "content": "1+1=!"},)


def test_chat_messages_stay_messages(write):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    prompt = load(write([{"prompt": messages, "answer": "a"}]), as_chat=True, instruction="!")[0]
    assert prompt.text is None
    assert prompt.messages == tuple(messages)


@pytest.mark.parametrize(
    ("setting", "column"),
    [("prompt_column", "question"), ("answer_column", "solution"), ("id_column", "uid")],
)
def test_a_missing_column_is_an_error_that_names_key_and_columns(write, setting, column):
    with pytest.raises(ConfigurationError) as caught:
        load(write(), **{setting: column})
    assert f"prompts.init_args.{setting}={column!r}" in str(caught.value)
    assert "prompt, answer, name, level" in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path, write):
    with pytest.raises(ConfigurationError, match=r"prompts.init_args.path='json'") as caught:
        load(str(tmp_path / "nowhere.jsonl"))
    assert "nowhere.jsonl" in str(caught.value)


def test_a_missing_split_is_an_error_that_names_it(write):
    with pytest.raises(ConfigurationError, match=r"prompts.init_args.path='json' \(split 'tset'\)"):
        load(write(), split="tset")


def test_a_file_that_is_no_json_is_a_configuration_error(tmp_path, write):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1=", \nnonsense')
    with pytest.raises(ConfigurationError, match=r"prompts.init_args.path='json'"):
        load(str(broken))
