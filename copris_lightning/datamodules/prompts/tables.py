"""The rows of a data set, either read literally (local JSON and CSV) or typed (all else)."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from copris_lightning.datamodules.prompts.literals import Unreadable, arrow_text, text_of, value_of
from copris_lightning.datamodules.prompts.rows import Row, read_csv, read_json
from copris_lightning.errors import ConfigurationError

_log = logging.getLogger(__name__)

_LITERAL = ("json", "csv")
"""Kinds of files whose types are guesses: they are read here rather than by `datasets`."""
_PLAIN_FIELDS = {"name", "version", "data_dir", "data_files", "description", "sep", "delimiter"}
"""Fields of a `datasets` config that the reading here follows, or that do not change values."""


class Table(Protocol):
    """Rows with named columns."""

    columns: list[str]

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def where(self, index: int) -> str:
        """Where a row stands, for errors."""
        ...

    def values(self, index: int, *, without: Collection[str]) -> dict[str, Any]:
        """A row's values but those of some columns, each of the type that it has in this row.

        Raises:
            Unreadable: the row cannot be read.
        """
        ...

    def text(self, index: int, column: str) -> Any:
        """A value with its leaves as text; ``None`` where there is none.

        Raises:
            Unreadable: it has no text.
        """
        ...


class LiteralTable:
    """Rows of local files as they are written.

    Args:
        rows: of all files.
        columns: that are known although no row may have them.
    """

    def __init__(self, rows: list[Row], columns: list[str]) -> None:
        self._rows = rows
        self.columns = list(
            dict.fromkeys([*columns, *(name for row in rows for name in row.cells)])
        )

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """File and line."""
        return self._rows[index].where

    def values(self, index: int, *, without: Collection[str]) -> dict[str, Any]:
        """A row's values; columns that it does not have are absent."""
        row = self._rows[index]
        if row.problem:
            raise Unreadable(row.problem)
        values = {}
        for name, cell in row.cells.items():
            if name in without:
                continue
            try:
                values[name] = value_of(cell)
            except Unreadable as error:
                raise Unreadable(f"column {name!r} {error}") from None
        return values

    def text(self, index: int, column: str) -> Any:
        """A cell's literal text; ``None`` for null and where the row lacks the column."""
        return text_of(self._rows[index].cells.get(column))


class TypedTable:
    """Rows of a ``datasets.Dataset``.

    Args:
        rows: the data set.
        name: of it and its split, for errors.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self._rows = rows
        self._arrow = rows.with_format("arrow")
        self._others, self._left_out = rows, set[str]()
        self._name = name
        self.columns = list(rows.column_names)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """Data set and index."""
        return f"{self._name}, index {index}"

    def values(self, index: int, *, without: Collection[str]) -> dict[str, Any]:
        """A row's values as `datasets` decodes them."""
        # Left out before they are decoded: what cannot be decoded may have a text.
        if self._left_out != set(without):
            self._left_out = set(without)
            self._others = self._rows.remove_columns([c for c in self.columns if c in without])
        return dict(self._others[index])

    def text(self, index: int, column: str) -> Any:
        """The exact text of a typed value."""
        return arrow_text(self._arrow[index][column][0])


def open_table(
    path: str, *, name: str | None, split: str, data_files: str | list[str] | None
) -> Table:
    """The rows that ``datasets.load_dataset`` would give for these arguments.

    Raises:
        ConfigurationError: there are none, or they cannot be read.
    """
    import pyarrow as pa
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    if Path(path).is_file():
        kind = "csv" if path.endswith((".csv", ".tsv")) else "json"
        raise ConfigurationError(
            f"path={path!r} is a file; set path={kind} (or parquet) and data_files={path}"
        )
    if path in _LITERAL and not data_files:
        raise ConfigurationError(f"path={path!r} needs data_files: which files to read")
    try:
        if path in _LITERAL or os.path.isdir(path):
            builder = load_dataset_builder(path, name=name, data_files=data_files)
            if builder.name in _LITERAL:
                return _literal_table(builder, path, split)
        rows = load_dataset(path, name=name, split=split, data_files=data_files)
    except ConfigurationError:
        raise
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        raise ConfigurationError(
            f"path={path!r} (split {split!r}) cannot be loaded: {error.__cause__ or error}"
        ) from error
    if rows.info.builder_name in _LITERAL:
        _log.warning(
            "path=%r has %s files, whose types are guessed column by column (12 "
            "beside 0.5 reads as 12.0): to have answers as they are written, download them and "
            "set path=%s with data_files",
            path,
            rows.info.builder_name.upper(),
            rows.info.builder_name,
        )
    return TypedTable(rows, f"{path} ({split})")


def _literal_table(builder: Any, path: str, split: str) -> LiteralTable:
    """Read the JSON or CSV files that a builder of `datasets` has found, and select the split."""
    from datasets import ReadInstruction

    config = builder.config
    _check_plain(config, path)
    files: Mapping[str, list[str]] = {str(k): list(v) for k, v in config.data_files.items()}
    # "train[:10%]+test" names two splits.
    wanted = list(files) if split == "all" else re.findall(r"(?:^|\+)\s*(\w+(?:\.\w+)*)", split)
    columns: list[str] = []
    read: dict[str, list[Row]] = {}
    for part in [part for part in files if part in wanted]:
        read[part] = []
        for file in files[part]:
            header, rows = _read(file, builder.name, getattr(config, "sep", ","))
            if columns and set(header) != set(columns):
                raise ConfigurationError(
                    f"data_files: {_shown_name(file)} has the columns "
                    f"{', '.join(header)}; the files before it have {', '.join(columns)}"
                )
            columns = header
            read[part] += rows
    sizes = {part: len(read.get(part, ())) for part in files}
    spec = "+".join(wanted) if split == "all" else split
    chosen: list[Row] = []
    for piece in ReadInstruction.from_spec(spec).to_absolute(sizes):
        chosen += read[piece.splitname][piece.from_ : piece.to]
    names = ", ".join(_shown_name(file) for part in read for file in files[part])
    if not any(read.values()):
        raise ConfigurationError(f"data_files: no row is in {names}")
    if chosen and all(row.problem for row in chosen):
        raise ConfigurationError(
            f"path={path!r}: no row of {names} can be read\n"
            + "\n".join(f"  {row.where}: the row {row.problem}" for row in chosen[:10])
        )
    return LiteralTable(chosen, columns)


def _read(file: str, kind: str, delimiter: str) -> tuple[list[str], list[Row]]:
    from datasets import DownloadManager

    local = Path(DownloadManager().download(file)) if "://" in file else Path(file)
    shown = _shown_name(file)
    if kind == "json":
        return [], read_json(local, shown)
    tabs = file.split("::")[0].removesuffix(".gz").endswith(".tsv")
    return read_csv(local, shown, "\t" if tabs else delimiter)


def _shown_name(file: str) -> str:
    """A file as its user would name it: from the working directory, if it is below that."""
    here = os.getcwd() + os.sep
    return file.removeprefix(here)


def _check_plain(config: Any, path: str) -> None:
    """Refuse options from a folder's card that would change what is read."""
    for option in dataclasses.fields(config):
        plain = option.default
        if option.name in _PLAIN_FIELDS or plain is dataclasses.MISSING:
            continue
        if getattr(config, option.name) != plain:
            raise ConfigurationError(
                f"path={path!r}: its README.md sets {option.name}="
                f"{getattr(config, option.name)!r}, which is not followed here; remove it, or "
                "convert the files to Parquet"
            )
