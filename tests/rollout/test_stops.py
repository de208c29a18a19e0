"""Stop strings are found at the token after which the whole text holds one, however it is cut."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from copris_lightning.rollout.decoding import ResponseDecoder
from copris_lightning.rollout.stops import StopStrings

TEXT = [
    "so <think>äöü 😀😀</think> the answer is </answer>\n\n€ 12, don't!",
    "ab aab abab 漢字 ...",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return made


def byte_fallback() -> Tokenizer:
    """As Llama 2's: a character without a token is written in bytes, a space before is dropped."""
    pieces = ["<unk>", *BYTES, "▁", "▁the", "ans", "wer", *"abc<>/\n.t"]
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return made


def metaspace() -> Tokenizer:
    pieces = ["<unk>", "▁", "▁the", "▁▁", "ans", "wer", *"abc<>/\n.t"]
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    made.decoder = decoders.Metaspace()
    return made


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", "the", "ans", "##wer", "##a", "a", "b", "##b", ".", "<", "/", ">", "'", "t"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}))
    made.decoder = decoders.WordPiece()
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    kind.__name__: kind for kind in (byte_level, byte_fallback, metaspace, word_pieces)
}


def tokenizer(kind: str) -> Any:
    made = KINDS[kind]()
    made.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<end>", special=True)])
    made.add_tokens([AddedToken("</answer>"), AddedToken(" and ")])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


DECODERS = {kind: ResponseDecoder(tokenizer(kind), ends=()) for kind in KINDS}
SIZES = {kind: len(tokenizer(kind)) for kind in KINDS}


def oracle(decode: Any, strings: Sequence[str], tokens: Sequence[int]) -> int | None:
    """The first prefix whose text, decoded in full, contains a stop string."""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        if any(string in text for string in strings):
            return end
    return None


def found(stops: StopStrings, tokens: Sequence[int], cuts: dict[int, str]) -> int | None:
    """What the watch finds when the response is cut after some tokens, into chunks or stages."""
    watch = stops.watch(())
    begin = 0
    for end in [*sorted(c for c in cuts if c < len(tokens)), len(tokens)]:
        assert watch is not None
        at = watch.first_end(tokens[begin:end])
        if at is not None:
            return begin + at
        if cuts.get(end) == "resume":
            watch = stops.watch(tokens[:end])
        begin = end
    return None


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[int], list[str], dict[int, str]]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    ids = st.integers(0, SIZES[kind] + 1)  # the last two are no tokens
    few = draw(st.lists(ids, min_size=1, max_size=6))
    # Few distinct tokens make strings recur; many make broken characters.
    tokens = draw(st.lists(st.sampled_from(few) | ids, max_size=60))
    text = DECODERS[kind].verbatim(tokens)
    strings = draw(st.lists(st.sampled_from(["</answer>", "ab", "\n\n", "😀", "€", " ", "a<"])))
    whole = [c for c in range(len(text)) if "\N{REPLACEMENT CHARACTER}" not in text[c : c + 1]]
    if whole:
        start = draw(st.sampled_from(whole))
        part = text[start : start + draw(st.integers(1, 24))].split("\N{REPLACEMENT CHARACTER}")[0]
        strings.append(part)
    cuts = st.dictionaries(st.integers(1, 60), st.sampled_from(["chunk", "resume"]), max_size=8)
    return kind, tokens, strings or ["</answer>"], draw(cuts)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_stop_string_is_found_where_the_whole_text_shows_it(case: Any) -> None:
    kind, tokens, strings, cuts = case
    decode = DECODERS[kind].verbatim
    stops = StopStrings(tuple(strings), decode)
    assert found(stops, tokens, cuts) == oracle(decode, strings, tokens)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("how", ["chunk", "resume"])
def test_a_stop_string_cut_at_every_offset_is_found(kind: str, how: str) -> None:
    # One letter at a time where the vocabulary can, so that every offset is a token's end.
    made = tokenizer(kind)
    vocabulary = made.get_vocab()
    ids = [vocabulary.get(letter, vocabulary.get(f"##{letter}")) for letter in "<ab/ab>"]
    tokens = [vocabulary["a"]] * 12 + [i for i in ids if i is not None] + [vocabulary["a"]] * 12
    decode = DECODERS[kind].verbatim
    stop = decode(tokens[11:-12])[1:].strip()
    expected = oracle(decode, [stop], tokens)
    assert expected is not None
    assert 12 < expected < len(tokens)
    for cut in range(1, len(tokens)):
        assert found(StopStrings((stop,), decode), tokens, {cut: how}) == expected


def test_a_character_split_over_tokens_and_a_token_that_holds_more_than_the_string() -> None:
    made = tokenizer("byte_level")
    decode = DECODERS["byte_level"].verbatim
    tokens = made("ab😀 ")["input_ids"]
    pieces = [made.get_vocab()[c] for c in "ðŁĺĢ"]  # the four bytes of it
    assert found(StopStrings(("😀",), decode), [*pieces, *pieces], {}) == 4
    # Bytes of the next character hang on the token that completes the string, or follow it.
    answer = made("</answer>")["input_ids"]
    stream = [*pieces[:3], *answer, pieces[0]]
    assert found(StopStrings(("</answer>",), decode), stream, {}) == len(stream) - 1
    assert found(StopStrings(("swe",), decode), [*tokens, *answer], {}) == len(tokens) + 1


@pytest.mark.parametrize("how", ["chunk", "resume"])
def test_a_character_cut_in_two_is_part_of_a_stop_string(how: str) -> None:
    made = tokenizer("byte_level").get_vocab()
    tokens = [made[c] for c in "aabðŁĺĢa"]
    stops = StopStrings(("b😀a",), DECODERS["byte_level"].verbatim)
    for cut in range(1, len(tokens)):
        assert found(stops, tokens, {cut: how}) == len(tokens)


@pytest.mark.parametrize("before", range(58, 74))
def test_a_character_after_many_broken_ones_is_whole(before: int) -> None:
    # Wherever the window is made to move on, also within the character.
    made = tokenizer("byte_level").get_vocab()
    tokens = [made[c] for c in "ð" * before + "ðŁĺĢa"]
    stops = StopStrings(("😀a",), DECODERS["byte_level"].verbatim)
    assert found(stops, tokens, {}) == before + 5


def test_work_per_token_does_not_grow_with_the_response() -> None:
    lengths: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        lengths.append(len(token_ids))
        return DECODERS["byte_level"].verbatim(token_ids)

    rng = random.Random(0)
    broken = tokenizer("byte_level").get_vocab()["ð"]
    size = SIZES["byte_level"]
    for draw in (lambda: rng.randrange(size), lambda: broken, lambda: size):  # the last: no text
        lengths.clear()
        watch = StopStrings(("a long string that never comes",), decode).watch(())
        assert watch is not None
        assert watch.first_end([draw() for _ in range(4000)]) is None
        assert sum(lengths) / 4000 < 100
        assert max(lengths) < 100


def test_what_was_there_before_is_not_looked_for() -> None:
    decode = DECODERS["metaspace"].verbatim
    vocabulary = tokenizer("metaspace").get_vocab()
    a, b = vocabulary["a"], vocabulary["b"]
    watch = StopStrings(("ab", "a long one"), decode).watch([a, b])
    assert watch is not None
    assert watch.first_end([b, b, a, b, b]) == 4


def test_nothing_to_look_for_costs_nothing() -> None:
    assert StopStrings((), lambda token_ids: 1 / 0).watch([1, 2]) is None
