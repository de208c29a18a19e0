"""Answers from typed sources: exact text for whatever Parquet can hold."""

from __future__ import annotations

import datetime
import decimal
import random
import struct

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from copris_lightning.datamodules.prompts.dataset import Columns, DatasetPrompts
from copris_lightning.errors import ConfigurationError

DAY = datetime.date(2024, 2, 29)
MOMENT = datetime.datetime(2024, 2, 29, 1, 2, 3, 4)


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Writes a column to a Parquet file and loads it as the answers."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)

    def load(column, **settings):
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"prompt": ["q"] * len(column), "answer": column}), path)
        prompts = DatasetPrompts("parquet", data_files=str(path), **settings)
        return [prompts[i].answer for i in range(len(prompts))]

    return load


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([42, -1, None], pa.int8()), ["42", "-1", None]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([12.0, 0.5, 1e22, 1e-7]), ["12.0", "0.5", "1e+22", "1e-07"]),
        (pa.array([0.1, 16777216.0, 1e30], pa.float32()), ["0.1", "16777216.0", "1e+30"]),
        (pa.array([decimal.Decimal("1.50"), decimal.Decimal("0E-2")]), ["1.50", "0.00"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array([DAY, None]), ["2024-02-29", None]),
        (pa.array([MOMENT]), ["2024-02-29T01:02:03.000004"]),
        (pa.array([MOMENT], pa.timestamp("us", "UTC")), ["2024-02-29T01:02:03.000004+00:00"]),
        (pa.array([1], pa.timestamp("ns")), ["1970-01-01T00:00:00.000000001"]),
        (pa.array([datetime.time(1, 2, 3)], pa.time32("ms")), ["01:02:03.000"]),
        (pa.array(["007", "", None]), ["007", "", None]),
        (pa.array(["a"], pa.large_string()), ["a"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([[0.1, None], None, []], pa.list_(pa.float32())), [["0.1", None], None, []]),
        (pa.array([{"a": 1, "b": [DAY]}, None]), [{"a": "1", "b": ["2024-02-29"]}, None]),
        (pa.array(['{"a": 1.50}', "7"], pa.json_()), [{"a": "1.50"}, "7"]),
        (pa.array([None, None], pa.null()), [None, None]),
    ],
    ids=lambda v: str(v.type) if isinstance(v, pa.Array) else "",
)
def test_every_type_has_its_exact_text(answers, column, expected):
    assert answers(column) == expected


@pytest.mark.parametrize(
    ("kind", "code", "bits"), [(pa.float16(), "e", 16), (pa.float32(), "f", 32)]
)
def test_a_float_reads_back_at_its_own_precision_and_is_no_longer_than_needed(
    answers, kind, code, bits
):
    draw = random.Random(0)
    raw = [draw.getrandbits(bits).to_bytes(bits // 8, "little") for _ in range(300)]
    values = [struct.unpack(f"<{code}", item)[0] for item in raw]
    values = [value for value in values if abs(value) < float("inf")]
    for value, text in zip(values, answers(pa.array(values, kind)), strict=True):
        assert struct.pack(code, float(text)) == struct.pack(code, value)
        digits = text.lower().split("e")[0].replace(".", "").replace("-", "").strip("0")
        shorter = f"{value:.{max(len(digits) - 2, 0)}e}"
        assert len(digits) < 2 or struct.pack(code, float(shorter)) != struct.pack(code, value)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"x"]),
        pa.array([datetime.timedelta(1)]),
        pa.array([{"a": b"x"}]),
        pa.array([10**12], pa.timestamp("s")),
    ],
    ids=lambda v: str(v.type),
)
def test_what_has_no_text_is_refused_by_row_and_column(answers, column):
    with pytest.raises(ConfigurationError, match=r"parquet \(train\), index 0, column 'answer'"):
        answers(column)


def test_rows_of_a_part_of_the_data_have_their_own_answers(answers):
    assert answers(pa.array(range(10)), split="train[7:9]") == ["7", "8"]


def test_fields_that_tables_fill_up_with_are_no_fields_of_a_message(tmp_path, answers):
    rows = [
        [{"role": "user", "content": "a", "name": None}],
        [{"role": "user", "content": "b", "name": "n"}],
    ]
    pq.write_table(pa.table({"prompt": rows}), tmp_path / "chat.parquet")
    path = str(tmp_path / "chat.parquet")
    prompts = DatasetPrompts("parquet", data_files=path, columns=Columns(answer=None))
    assert prompts[0].messages == ({"role": "user", "content": "a"},)
    assert prompts[1].messages == ({"role": "user", "content": "b", "name": "n"},)
