"""Reading JSON and CSV files row by row, without guessing types: what is written is what is read.

A row that cannot be read does not end the reading: it is kept with the reason, so that all such
rows of a data set are named together.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copris_lightning.datamodules.prompts.literals import Unreadable, doubled, parse_json, shown
from copris_lightning.errors import ConfigurationError

_UTF8_BOM = b"\xef\xbb\xbf"
_UNPACKERS = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""What files of other formats begin with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        file: that it stands in, for errors.
        place: "line 3", or "row 3" of a JSON array; counted from 1.
        cells: by column; numbers of JSON as :class:`Number`, cells of CSV as text.
        problem: why there are none; empty for a good row.
    """

    file: str
    place: str
    cells: dict[str, Any]
    problem: str = ""

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.file}, {self.place}"


def read_json(path: Path, file: str) -> list[Row]:
    """Rows of a JSON Lines file, or of a JSON file that holds an array of objects.

    Args:
        path: of the file; it may be packed by gzip, bzip2 or xz.
        file: its name in errors.

    Raises:
        ConfigurationError: it cannot be read, or is no JSON of this kind.
    """
    data = _content(path, file)
    if data.lstrip()[:1] == b"[":
        items = _array(data, file)
        if items is not None:
            return [_json_row(item, file, f"row {n}") for n, item in enumerate(items, 1)]
    lines = enumerate(data.split(b"\n"), 1)
    rows = [_json_line(line, file, f"line {n}") for n, line in lines if line.strip()]
    if rows and rows[0].problem and _is_one_object(data):
        raise _bad(file, "holds one JSON object over several lines; give one object a line")
    return rows


def read_csv(path: Path, file: str, delimiter: str) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file whose first line names its columns.

    Every cell is text; one that is empty is the empty text. Blank lines are left out.

    Args:
        path: of the file; it may be packed by gzip, bzip2 or xz.
        file: its name in errors.
        delimiter: between cells.

    Raises:
        ConfigurationError: it cannot be read, or its first line does not name columns.
    """
    # A byte that is no UTF-8 becomes a lone surrogate, which is told of its row.
    text = _content(path, file).decode(errors="surrogateescape")
    rows: list[Row] = []
    with _long_cells():
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        place = "line 1"
        try:
            header = _header(lines, file)
            place = f"line {lines.line_num + 1}"
            for cells in lines:
                if cells:
                    rows.append(_csv_row(cells, header, file, place))
                place = f"line {lines.line_num + 1}"
        except csv.Error as error:
            rows.append(Row(file, place, {}, f"is no CSV, and ends what can be read: {error}"))
    return header, rows


def _array(data: bytes, file: str) -> list[Any] | None:
    """The items of a file that is one array; ``None`` if its first line is one by itself."""
    try:
        found = parse_json(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _bad(file, f"is not UTF-8: byte 0x{data[error.start]:02x} in line {line}") from None
    except Unreadable as error:
        if "Extra data" in str(error):
            return None
        raise _bad(file, str(error)) from None
    return list(found)


def _is_one_object(data: bytes) -> bool:
    try:
        return isinstance(parse_json(data.decode()), dict)
    except (UnicodeDecodeError, Unreadable):
        return False


def _json_line(line: bytes, file: str, place: str) -> Row:
    try:
        return _json_row(parse_json(line.decode().strip()), file, place)
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"
        return Row(file, place, {}, problem)
    except Unreadable as error:
        return Row(file, place, {}, str(error))


def _json_row(item: Any, file: str, place: str) -> Row:
    if isinstance(item, dict):
        return Row(file, place, item)
    return Row(file, place, {}, f"is {shown(item)}, not an object")


def _csv_row(cells: list[str], header: list[str], file: str, place: str) -> Row:
    if len(cells) != len(header):
        problem = f"has {len(cells)} cells, and the first line names {len(header)} columns"
        return Row(file, place, {}, problem)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return Row(file, place, {}, "is not UTF-8")
    return Row(file, place, dict(zip(header, cells, strict=True)))


def _header(lines: Iterator[list[str]], file: str) -> list[str]:
    try:
        header = next((cells for cells in lines if cells), [])
    except csv.Error as error:
        raise _bad(file, f"is no CSV: {error} in the first line") from None
    if (name := doubled(header)) is not None:
        raise _bad(file, f"names the column {name!r} twice")
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        raise _bad(file, "is not UTF-8: its first line") from None
    return header


def _content(path: Path, file: str) -> bytes:
    """What is in a file, unpacked and without a byte order mark."""
    try:
        data = path.read_bytes()
        for start, unpack in _UNPACKERS.items():
            if data.startswith(start):
                data = unpack(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise _bad(file, f"cannot be read: {error}") from error
    for start, name in _FOREIGN.items():
        if data.startswith(start):
            raise _bad(file, f"is {name}; give UTF-8 text, plain or packed by gzip, bzip2 or xz")
    return data.removeprefix(_UTF8_BOM)


def _bad(file: str, problem: str) -> ConfigurationError:
    return ConfigurationError(f"data_files: {file} {problem}")


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells past 128 KiB unless told otherwise, for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
