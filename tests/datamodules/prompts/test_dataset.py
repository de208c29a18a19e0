"""Data sets of prompts: which files, rows and columns are read, and how they are refused."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest

from copris_lightning.datamodules.prompts.dataset import Columns, DatasetPrompts
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt

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


@pytest.fixture
def raw(tmp_path, write):
    """Writes a file as it is given."""

    def text_to_file(content, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return text_to_file


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
    prompts = load(write(rows), columns=Columns("question", "solution", "uid"))
    assert prompts[0] == Prompt("12", text="q", answer="7", extra={})


def test_a_data_set_without_answers_is_fine_if_told_so(write):
    prompts = load(write([{"prompt": "q"}]), columns=Columns(answer=None))
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
    [("prompt", "question"), ("answer", "solution"), ("id", "uid")],
)
def test_a_missing_column_is_an_error_that_names_key_and_columns(write, setting, column):
    with pytest.raises(ConfigurationError) as caught:
        load(write(), columns=Columns(**{setting: column}))
    assert f"columns.{setting}={column!r}" in str(caught.value)
    assert "prompt, answer, name, level" in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path, write):
    with pytest.raises(ConfigurationError, match=r"path='json'") as caught:
        load(str(tmp_path / "nowhere.jsonl"))
    assert "nowhere.jsonl" in str(caught.value)


def test_a_missing_split_is_an_error_that_names_it(write):
    with pytest.raises(ConfigurationError, match=r"path='json' \(split 'tset'\)"):
        load(write(), split="tset")


def test_a_file_that_is_no_json_is_a_configuration_error(tmp_path, write):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1=", \nnonsense')
    with pytest.raises(ConfigurationError, match=r"path='json'"):
        load(str(broken))


# -- answers and ids as they are written ---------------------------------------------------

LITERALS = ["42", "2.0", "0.5", "1e5", "-0", "1E+400", "007", "NA", "2020-01-01", "1_000", "true"]


@pytest.mark.parametrize("literal", ["42", "2.0", "0.5", "1e5", "-0", "1E+400", "NaN", "9" * 5000])
def test_a_number_of_json_is_an_answer_in_its_own_digits(raw, literal):
    rows = '{"prompt": "q", "answer": %s}\n{"prompt": "q", "answer": 0.5}\n' % literal  # noqa: UP031
    prompts = load(raw(rows))
    assert [prompts[i].answer for i in range(2)] == [literal, "0.5"]


def test_an_answer_keeps_its_structure_and_its_nulls(raw):
    row = '{"prompt": "q", "answer": [1.0, {"a": 1e5, "b": null, "c": [true, "x", 2]}, []]}'
    assert load(raw(row))[0].answer == ["1.0", {"a": "1e5", "b": None, "c": ["true", "x", "2"]}, []]


def test_an_answer_that_is_null_or_absent_is_none(raw):
    prompts = load(
        raw('{"prompt": "q", "answer": null}\n{"prompt": "q"}\n{"prompt": "q", "answer": 1}')
    )
    assert [prompts[i].answer for i in range(2)] == [None, None]


@pytest.mark.parametrize("literal", [*LITERALS, "", " 2 ", "0x1F", "null", "nan", "a\tb"])
def test_a_cell_of_csv_is_its_text(raw, literal):
    path = raw(f"prompt,answer,id\nq,{literal},001\nr,2,002\n", "rows.csv")
    prompts = DatasetPrompts("csv", data_files=path, columns=Columns(id="id"))
    assert prompts[0] == Prompt("001", text="q", answer=literal)
    assert prompts[1] == Prompt("002", text="r", answer="2")


def test_quoted_cells_of_csv_may_hold_lines_delimiters_and_quotes(raw):
    path = raw('prompt,answer\r\n"a\nb, ""c""",1\r\n\r\nd,2\r\n', "rows.csv")
    prompts = DatasetPrompts("csv", data_files=path)
    assert [(p.text, p.answer) for p in (prompts[0], prompts[1])] == [
        ('a\nb, "c"', "1"),
        ("d", "2"),
    ]


def test_a_long_cell_of_csv_is_read_and_the_modules_limit_left_alone(raw):
    import csv

    limit = csv.field_size_limit()
    path = raw(f"prompt,answer\nq,{'7' * 200_000}\n", "rows.csv")
    assert DatasetPrompts("csv", data_files=path)[0].answer == "7" * 200_000
    assert csv.field_size_limit() == limit


def test_ids_are_as_they_are_written(raw):
    rows = '{"prompt": "q", "answer": 1, "id": 1.0}\n{"prompt": "q", "answer": 1, "id": "007"}'
    prompts = load(raw(rows), columns=Columns(id="id"))
    assert [prompts[i].id for i in range(2)] == ["1.0", "007"]


@pytest.mark.parametrize("value", ["null", '""', "[1]", '{"a": 1}'])
def test_what_cannot_be_an_id_is_refused(raw, value):
    prompts = load(raw('{"prompt": "q", "answer": 1, "id": %s}' % value), columns=Columns(id="id"))  # noqa: UP031
    with pytest.raises(ConfigurationError, match=r"rows.jsonl, line 1, column 'id': .*is no id"):
        prompts[0]


def test_other_columns_keep_their_types_row_by_row(raw):
    rows = [
        '{"prompt": "q", "answer": 1, "x": 1, "date": "2020-01-01"}',
        '{"prompt": "q", "answer": 1, "x": 1.5, "y": [1, {"z": 2.0}]}',
        '{"prompt": "q", "answer": 1, "x": "one"}',
        '{"prompt": "q", "answer": 1, "x": null}',
        '{"prompt": "q", "answer": 1}',
    ]
    prompts = load(raw("\n".join(rows)))
    extras = [prompts[i].extra for i in range(5)]
    assert extras == [
        {"x": 1, "date": "2020-01-01"},
        {"x": 1.5, "y": [1, {"z": 2.0}]},
        {"x": "one"},
        {"x": None},
        {},
    ]
    assert [type(extra.get("x")) for extra in extras[:2]] == [int, float]


# -- which files -------------------------------------------------------------------------


def test_files_may_begin_with_a_mark_end_lines_with_crlf_and_have_blank_lines(raw):
    path = raw(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n\r\n{"prompt": "b", "answer": 2}\r\n')
    prompts = load(path)
    assert [prompts[i].text for i in range(len(prompts))] == ["a", "b"]
    csv = raw(b"\xef\xbb\xbfprompt,answer\r\na,1\r\n", "rows.csv")
    assert DatasetPrompts("csv", data_files=csv)[0].text == "a"


def test_a_file_of_json_may_be_one_array(raw):
    prompts = load(
        raw(' [{"prompt": "a", "answer": 1.50},\n {"prompt": "b", "answer": 2}]', "r.json")
    )
    assert [prompts[i].answer for i in range(len(prompts))] == ["1.50", "2"]


def test_packed_files_are_read_whatever_they_are_called(raw):
    packed = gzip.compress(b'{"prompt": "a", "answer": 1.50}')
    assert load(raw(packed, "rows.jsonl.gz"))[0].answer == "1.50"
    assert load(raw(packed, "rows.jsonl"))[0].answer == "1.50"


def test_a_pattern_names_files_in_order(raw, tmp_path):
    for name in "ba":
        raw(f'{{"prompt": "{name}", "answer": 1}}', f"part_{name}.jsonl")
    prompts = load(str(tmp_path / "part_*.jsonl"))
    assert [prompts[i].text for i in range(len(prompts))] == ["a", "b"]


@pytest.mark.parametrize(
    ("split", "answers"),
    [
        ("train", ["12", "0.5"]),
        ("test", ["007"]),
        ("train[1:]", ["0.5"]),
        ("train[:50%]+test", ["12", "007"]),
        ("all", ["12", "0.5", "007"]),
    ],
)
def test_a_folder_is_read_by_the_same_rule(raw, tmp_path, split, answers):
    raw('{"prompt": "a", "answer": 12}\n{"prompt": "a", "answer": 0.5}', "set/train.jsonl")
    raw('{"prompt": "a", "answer": "007"}', "set/test.jsonl")
    prompts = DatasetPrompts(str(tmp_path / "set"), split=split)
    assert [prompts[i].answer for i in range(len(prompts))] == answers


def test_files_with_tabs_are_known_by_their_name(raw):
    path = raw("prompt\tanswer\na,b\t007\n", "rows.tsv")
    assert DatasetPrompts("csv", data_files=path)[0] == Prompt("00000000", text="a,b", answer="007")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "rows.jsonl", "no row is in .*rows.jsonl"),
        ("prompt,answer\n", "rows.csv", "no row is in .*rows.csv"),
        ("a,b,a\n1,2,3\n", "rows.csv", "rows.csv names the column 'a' twice"),
        ('"prompt,answer\na,1', "rows.csv", "rows.csv is no CSV: .* in the first line"),
        (b"\xff\xfe{\x00", "rows.jsonl", "rows.jsonl is UTF-16"),
        (b"PK\x03\x04", "rows.zip", "rows.zip is a zip archive"),
        (gzip.compress(b'{"prompt": "a"}')[:-4], "rows.gz", "rows.gz cannot be read"),
        ('[{"prompt": "a"},', "rows.json", "rows.json is no JSON"),
        ('{"data":\n[{"prompt": "a"}]}', "rows.json", "one JSON object over several lines"),
        (b'[{"prompt":\n"\xff"}]', "rows.json", "not UTF-8: byte 0xff in line 2"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_key(raw, content, name, message):
    kind = "csv" if name.endswith("csv") else "json"
    with pytest.raises(ConfigurationError, match=f"data_files: .*{message}"):
        DatasetPrompts(kind, data_files=raw(content, name))


def test_files_of_csv_must_have_the_same_columns(raw):
    paths = [raw("prompt,answer\na,1\n", "a.csv"), raw("prompt,solution\na,1\n", "b.csv")]
    with pytest.raises(
        ConfigurationError, match=r"b.csv has the columns prompt, solution; .*answer"
    ):
        DatasetPrompts("csv", data_files=paths)


def test_a_path_that_is_a_file_says_how_to_write_it(raw):
    with pytest.raises(ConfigurationError, match=r"is a file; set path=json .* data_files="):
        DatasetPrompts(raw("{}"))


def test_json_without_files_does_not_look_for_some_in_the_working_directory(
    raw, tmp_path, monkeypatch
):
    raw('{"prompt": "a", "answer": 1}', "train.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"path='json' needs data_files"):
        DatasetPrompts("json")


def test_options_of_a_folders_card_that_change_values_are_refused(raw, tmp_path):
    raw("prompt;answer\na;1\n", "set/train.csv")
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n%s---\n"
    raw(card % "", "set/README.md")
    assert DatasetPrompts(str(tmp_path / "set"))[0].answer == "1"
    raw(card % "  skiprows: 1\n", "set/README.md")
    with pytest.raises(ConfigurationError, match=r"README.md sets skiprows=1"):
        DatasetPrompts(str(tmp_path / "set"))


# -- rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nonsense", "line 2: is no JSON: Expecting value at character 1"),
        ("[1]", "line 2: is a list, not an object"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: names the key 'prompt' twice"),
        ('{"answer": 1}', r"line 2, column 'prompt' \(id '00000001'\): is missing"),
        ('{"prompt": null}', r"line 2, column 'prompt' \(id '00000001'\): is null; it must"),
        ('{"prompt": 3}', "column 'prompt' .*: is the number 3; it must be text"),
        ('{"prompt": ""}', "column 'prompt' .*: is empty"),
        ('{"prompt": []}', "column 'prompt' .*: is a list without messages"),
        ('{"prompt": {"role": "user"}}', "column 'prompt' .*: is an object; it must be text"),
        ('{"prompt": "\\ud800"}', "column 'prompt' .*: holds .*ud800, half of a character"),
        ('{"prompt": "a", "answer": "\\ud800"}', "column 'answer' .*: holds .*half of a character"),
        ('{"prompt": "a", "x": %s}' % ("9" * 5000), "column 'x' holds an integer of 5000 digits"),
        ('{"prompt": "a", "x": %s}' % ("[" * 200 + "]" * 200), "nested deeper than 100"),
        ('{"prompt": "a", "answer": %s}' % ("[" * 5000 + "]" * 5000), "nested deeper than 100"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_by_line_column_and_id(raw, row, message):
    prompts = load(raw('{"prompt": "q", "answer": 1}\n' + row + "\n"))
    assert prompts[0].answer == "1"
    with pytest.raises(ConfigurationError, match=f"rows.jsonl, .*{message}"):
        prompts[1]


def test_bytes_that_are_no_utf8_are_told_of_their_row(raw):
    prompts = load(raw(b'{"prompt": "q", "answer": 1}\n{"prompt": "\xff"}\n'))
    with pytest.raises(ConfigurationError, match=r"line 2: is not UTF-8: byte 0xff at position 13"):
        prompts[1]
    prompts = DatasetPrompts("csv", data_files=raw(b"prompt,answer\na,\xff\nb,1\n", "rows.csv"))
    with pytest.raises(ConfigurationError, match=r"rows.csv, line 2: is not UTF-8"):
        prompts[0]
    assert prompts[1].answer == "1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a", "line 4: has 1 cells, and the first line names 2 columns"),
        ("a,1,2", "line 4: has 3 cells, and the first line names 2 columns"),
        ('"a"b,1', "line 4: is no CSV, and ends what can be read"),
        ('"a,1\nb,2\n', "line 4: is no CSV, and ends what can be read"),
    ],
)
def test_a_row_of_csv_that_does_not_fit_is_named_by_its_line(raw, row, message):
    path = raw(f'prompt,answer\n"a\nb",1\n{row}', "rows.csv")
    prompts = DatasetPrompts("csv", data_files=path)
    assert prompts[0].text == "a\nb"
    with pytest.raises(ConfigurationError, match=f"rows.csv, {message}"):
        prompts[1]
