"""Any JSON value in any column: right training rows, or a ConfigurationError, and nothing else.

Files are written by hand from literals, and what must come out is put together beside them, so
that no reader of JSON or CSV is compared with itself.
"""

from __future__ import annotations

import json
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from simulated_fits import build
from some_rewards import WritesDown

from copris_lightning.datamodules.prompts.dataset import Columns, DatasetPrompts
from copris_lightning.datamodules.prompts.inspection import usable_prompts
from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptStream
from copris_lightning.errors import ConfigurationError
from copris_lightning.quickstart.warm_start import character_tokenizer

LIMIT = 16
TOKENIZER = character_tokenizer()


@dataclass(frozen=True)
class Value:
    """A JSON value: as it stands in a file, as an answer, and as any other column."""

    literal: str
    answer: Any
    plain: Any


def scalar(literal: str, plain: Any) -> Value:
    return Value(literal, literal, plain)


numbers = st.one_of(
    st.integers(-(10**25), 10**25).map(lambda n: scalar(str(n), n)),
    st.sampled_from(
        [
            scalar("-0", 0),
            scalar("2.0", 2.0),
            scalar("1e5", 100000.0),
            scalar("1E+2", 100.0),
            scalar("0.10", 0.1),
            scalar("1e400", float("inf")),
            scalar("-Infinity", float("-inf")),
        ]
    ),
)
# Without halves of characters, which test_dataset.py has.
characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab1+= \n")
strings = st.text(characters, max_size=6).map(lambda s: Value(json.dumps(s), s, s))
leaves = st.one_of(
    numbers,
    strings,
    st.sampled_from([Value("null", None, None), scalar("true", True), scalar("false", False)]),
)


def listed(items: list[Value]) -> Value:
    return Value(
        f"[{', '.join(item.literal for item in items)}]",
        [item.answer for item in items],
        [item.plain for item in items],
    )


def keyed(items: dict[str, Value]) -> Value:
    return Value(
        "{%s}" % ", ".join(f"{json.dumps(k)}: {v.literal}" for k, v in items.items()),  # noqa: UP031
        {k: v.answer for k, v in items.items()},
        {k: v.plain for k, v in items.items()},
    )


values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3).map(listed)
        | st.dictionaries(st.text("ab.", max_size=2), inner, max_size=3).map(keyed)
    ),
    max_leaves=8,
)


def spelled(text: str) -> Value:
    return Value(json.dumps(text), text, text)


def message(role: Value, content: Value) -> Value:
    return keyed({"role": role, "content": content})


words = st.text("ab1+=", min_size=1, max_size=5).map(spelled)
parts = words.map(lambda text: listed([keyed({"type": spelled("text"), "text": text})]))
roles = st.sampled_from(["user", "assistant", "system"]).map(spelled)
user = st.builds(message, st.just(spelled("user")), words | parts)
conversations = st.lists(st.builds(message, roles, words), max_size=2).flatmap(
    lambda before: user.map(lambda last: listed([*before, last]))
)
# Near misses: some roles and contents are right, some are anything.
near_misses = st.lists(
    st.fixed_dictionaries({}, optional={"role": roles | values, "content": words | values}).map(
        keyed
    ),
    max_size=3,
).map(listed)
prompts = st.one_of(words, conversations, near_misses, st.text("ab", max_size=20).map(spelled))
ids = st.one_of(numbers, words)
good_rows = st.fixed_dictionaries(
    {"prompt": words | conversations, "id": ids}, optional={"answer": values, "x": values}
)
any_rows = st.fixed_dictionaries(
    {}, optional={"prompt": prompts | values, "answer": values, "id": ids | values, "x": values}
)


def own_id(row: dict[str, Value]) -> str:
    return repr(row["id"].answer if "id" in row else None)


rows = st.lists(good_rows, min_size=1, max_size=3, unique_by=own_id) | st.lists(
    good_rows | any_rows, min_size=1, max_size=5, unique_by=own_id
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def text_of_prompt(value: Any) -> str | None:
    """What the model must get for a prompt under the tests' template; ``None`` if it is refused."""
    text = ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, list):
        for message in value:
            if not isinstance(message, dict) or message.get("role") in (None, ""):
                return None
            role, content = message["role"], message.get("content")
            if isinstance(content, list):
                if any(
                    not isinstance(part, str)
                    and not (
                        isinstance(part, dict)
                        and part.get("type") == "text"
                        and isinstance(part.get("text"), str)
                    )
                    for part in content
                ):
                    return None
                content = "".join(p if isinstance(p, str) else p["text"] for p in content)
            if not isinstance(role, str) or not isinstance(content, str):
                return None
            text += content
        if not value or value[-1]["role"] == "assistant":
            return None
        if value[-1]["role"] == "user" and not value[-1].get("content"):
            return None
    fits = 0 < len(text) <= LIMIT
    return text if fits and all(c == "\n" or " " <= c <= "~" for c in text) else None


def is_id(value: Value | None) -> bool:
    return value is not None and isinstance(value.answer, str) and value.answer != ""


Expected = list[tuple[str, str, Any, dict[str, Any]] | None]
"""Per row: id, text, answer and other columns; ``None`` for one that is to be refused."""


def check(path: str, kind: str, expected: Expected) -> None:
    """Read a file: it gives exactly these rows, or is refused for exactly those that are none."""
    encode = PromptEncoder(TOKENIZER, max_prompt_tokens=LIMIT, key="task.prompts")
    source = DatasetPrompts(kind, data_files=path, columns=Columns(id="id"))
    bad = expected.count(None)
    event(f"{kind}: {'some rows are refused' if bad else 'all rows are used'}")
    if bad:
        refusal = f"{bad} of {len(expected)} prompts cannot be used"
        with pytest.raises(ConfigurationError, match=refusal):
            usable_prompts(source, encode, skip_long=False)
        return
    usable = usable_prompts(source, encode, skip_long=False)
    stream = PromptStream(source, encode, indices=usable)
    for queued, row in zip(stream, expected, strict=True):
        prompt = queued.prompt
        found = (prompt.id, TOKENIZER.decode(queued.token_ids), prompt.answer, prompt.extra)
        assert repr(found) == repr(row)
        assert repr(pickle.loads(pickle.dumps(prompt))) == repr(prompt)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


def json_row(row: dict[str, Value]) -> tuple[str, str, Any, dict[str, Any]] | None:
    text = text_of_prompt(row["prompt"].plain) if "prompt" in row else None
    if text is None or not is_id(row.get("id")):
        return None
    answer = row["answer"].answer if "answer" in row else None
    extra = {"x": row["x"].plain} if "x" in row else {}
    return row["id"].answer, text, answer, extra


GOOD = {
    "prompt": Value('"1+"', "1+", "1+"),
    "answer": scalar("12", 12),
    "id": scalar("7", 7),
}


@quick
@given(rows, st.booleans())
def test_rows_of_json_are_right_or_refused(found, as_array):
    found = [{**GOOD, "id": spelled("good")}, *found]
    lines = [keyed(row).literal for row in found]
    text = f"[{', '.join(lines)}]" if as_array else "\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        path.write_text(text, encoding="utf-8")
        check(str(path), "json", [json_row(row) for row in found])


@quick
@given(st.sampled_from(["prompt", "answer", "id"]), values)
def test_one_odd_value_in_a_good_row_is_right_or_refused(column, value):
    found = [{**GOOD, "id": spelled("good")}, {**GOOD, column: value}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        path.write_text("\n".join(keyed(row).literal for row in found), encoding="utf-8")
        check(str(path), "json", [json_row(row) for row in found])


cells = st.one_of(
    values.map(lambda v: v.literal),
    st.text('ab1+," \n\té', max_size=6),
    st.just(""),
    st.just("007"),
)


@quick
@given(
    st.lists(
        st.tuples(words.map(lambda word: word.plain) | cells, cells, cells, cells),
        min_size=1,
        max_size=4,
        unique_by=lambda row: row[2],
    )
)
def test_rows_of_csv_are_right_or_refused(found):
    def quoted(cell: str) -> str:
        return '"' + cell.replace('"', '""') + '"'

    def row(prompt: str, answer: str, name: str, x: str) -> tuple[str, str, str, Any] | None:
        text = text_of_prompt(prompt)
        return (name, text, answer, {"x": x}) if text and name else None

    lines = ["prompt,answer,id,x", *(",".join(map(quoted, cells)) for cells in found)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.csv")
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
        check(str(path), "csv", [row(*cells) for cells in found])


@quick
@given(st.binary(max_size=40), st.sampled_from([b"", b'{"prompt": "a", "id": 1, "answer": ', b"["]))
def test_no_bytes_in_a_file_give_another_error(data, start):
    for kind in ("json", "csv"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows")
            path.write_bytes(start + data)
            encode = PromptEncoder(TOKENIZER, max_prompt_tokens=LIMIT, key="k")
            try:
                source = DatasetPrompts(kind, data_files=str(path))
                list(
                    PromptStream(
                        source, encode, indices=usable_prompts(source, encode, skip_long=False)
                    )
                )
            except ConfigurationError:
                pass


exact = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1).map(lambda n: (n, str(n))),
    pa.float64(): st.floats(allow_nan=False).map(lambda f: (f, repr(f))),
    pa.bool_(): st.booleans().map(lambda b: (b, "true" if b else "false")),
    pa.string(): st.text(characters, max_size=6).map(lambda s: (s, s)),
    pa.binary(): st.binary(max_size=4).map(lambda b: (b, ConfigurationError)),
}


@settings(quick, max_examples=25)
@given(st.data())
def test_rows_of_parquet_are_right_or_refused(data):
    kind = data.draw(st.sampled_from(list(exact)))
    nested = data.draw(st.booleans())
    column = data.draw(st.lists(st.none() | exact[kind], min_size=1, max_size=4))
    stored = [None if item is None else item[0] for item in column]
    answers = [None if item is None else item[1] for item in column]
    names = [f"n{i}" for i in range(len(column))]
    first = st.lists(words.map(lambda word: word.plain), min_size=len(names) - 1)
    odd = st.sampled_from(["a", "b", None, "", "\xe9"])
    texts = [*data.draw(first)[: len(names) - 1], data.draw(odd)]
    table = {
        "prompt": pa.array(texts, pa.string()),
        "id": pa.array(names),
        "answer": pa.array([[x] for x in stored], pa.list_(kind))
        if nested
        else pa.array(stored, kind),
    }
    expected = [
        (name, text, [answer] if nested else answer, {})
        if text and answer is not ConfigurationError
        else None
        for name, text, answer in zip(names, map(text_of_prompt, texts), answers, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(table), Path(folder, "rows.parquet"))
        check(str(Path(folder, "rows.parquet")), "parquet", expected)


@settings(quick, max_examples=8)
@given(rows)
def test_a_run_trains_on_such_rows_or_refuses_them(tiny_checkpoint, found):
    found = [*found, *({**GOOD, "id": spelled(f"good{i}")} for i in range(4))]
    expected = [json_row(row) for row in found]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("\n".join(keyed(row).literal for row in found), encoding="utf-8")
        reward = WritesDown(str(Path(folder, "seen")))
        source = DatasetPrompts("json", data_files=str(path), columns=Columns(id="id"))
        data = {"prompts": source, "reward": reward, "cap": 4, "groups": 2}
        trainer, module, datamodule, _ = build(
            tiny_checkpoint, Path(folder), data=data, max_steps=1
        )
        bad = expected.count(None)
        event("some rows are refused" if bad else "all rows are used")
        if bad:
            refusal = f"{bad} of {len(expected)} prompts cannot be used"
            with pytest.raises(ConfigurationError, match=refusal):
                trainer.fit(module, datamodule=datamodule)
            assert not reward.prompts()
            return
        trainer.fit(module, datamodule=datamodule)
        seen = reward.prompts()
        assert seen
        assert all(
            any((prompt.id, prompt.answer) == (row[0], row[2]) for row in expected)
            for prompt in seen
        )
