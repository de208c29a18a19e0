"""Prompts from a data set: a row's columns become prompt, answer and id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from copris_lightning.datamodules.prompts.literals import Unreadable, plain_text, shown
from copris_lightning.datamodules.prompts.messages import UnusablePrompt, conversation
from copris_lightning.datamodules.prompts.tables import Table, open_table
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt


@dataclass(frozen=True)
class Columns:
    """Which of a data set's columns is what.

    Attributes:
        prompt: the prompt: text, or a list of chat messages.
        answer: what the reward compares with; ``None`` if there is none.
        id: the prompt's id; by default the row's index is used.
    """

    prompt: str = "prompt"
    answer: str | None = "answer"
    id: str | None = None

    @property
    def texts(self) -> set[str]:
        """Those that are read as text, whatever the file's format."""
        named = {column for column in (self.answer, self.id) if column is not None}
        return named - {self.prompt}

    def check(self, known: Sequence[str]) -> None:
        """Refuse a column that the data set has not.

        Raises:
            ConfigurationError: names it, and those that there are.
        """
        for name, column in vars(self).items():
            if column is not None and column not in known:
                raise ConfigurationError(
                    f"columns.{name}={column!r}: the data set has the columns {', '.join(known)}"
                )


class DatasetPrompts:
    """Prompts from a data set of the hub, or from local JSON, CSV or Parquet files.

    Answers reach the reward as text, whatever the file's format: the literal text of a scalar of
    JSON or CSV (``42`` is ``"42"``, ``2.0`` is ``"2.0"``, CSV's ``007`` is ``"007"`` and an empty
    cell is ``""``), the exact text of a typed value of Parquet, Arrow or the hub. Lists and objects
    keep their structure, with text for their leaves; ``null``, and a row of JSON without the
    column, are ``None``. So are ids. Other columns keep their types, row by row; cells of a CSV
    file are text.

    Local JSON is JSON Lines, or one array of objects; JSON and CSV may be packed by gzip, bzip2 or
    xz, and are held in memory.

    Args:
        path: as for ``datasets.load_dataset``: a hub name, a folder, or ``json``, ``csv``,
            ``parquet`` together with ``data_files``.
        columns: which of its columns is the prompt, the answer and the id.
        name: the data set's configuration.
        split: which part of it, as in ``train[:10%]``.
        data_files: local files; patterns such as ``data/*.jsonl`` are allowed.
        as_chat: wrap a text prompt as one user message, for the model's chat template.
        instruction: appended to a text prompt.

    Raises:
        ConfigurationError: the data set cannot be loaded or lacks a column.
    """

    def __init__(
        self,
        path: str,
        columns: Columns = Columns(),
        name: str | None = None,
        split: str = "train",
        data_files: str | list[str] | None = None,
        as_chat: bool = False,
        instruction: str = "",
    ) -> None:
        self._rows: Table = open_table(path, name=name, split=split, data_files=data_files)
        columns.check(self._rows.columns)
        self._columns = columns
        self._as_chat = as_chat
        self._instruction = instruction

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self._rows)

    def place_of(self, index: int) -> str:
        """File, line and column of a prompt, for errors."""
        return f"{self._rows.where(index)}, column {self._columns.prompt!r}"

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row; columns that are nothing else are in its ``extra``.

        Raises:
            ConfigurationError: the row cannot be used; names file, line, column and id.
        """
        name, column = "", None
        try:
            row = self._rows.values(index, without=self._columns.texts)
            column = self._columns.id
            name = self._id(index)
            column = self._columns.answer
            answer = self._rows.text(index, column) if column else None
            column = self._columns.prompt
            if column not in row:
                raise Unreadable("is missing")
            prompt = self._content(row[column])
        except (Unreadable, UnusablePrompt) as error:
            place = [self._rows.where(index)] + ([f"column {column!r}"] if column else [])
            raise ConfigurationError(
                f"{', '.join(place)}{f' (id {name!r})' if name else ''}: {error}"
            ) from None
        row.pop(self._columns.prompt)
        return Prompt(name, **prompt, answer=answer, extra=row)

    def _id(self, index: int) -> str:
        if self._columns.id is None:
            return f"{index:08d}"
        name = self._rows.text(index, self._columns.id)
        if not isinstance(name, str) or not name:
            raise Unreadable(f"is {shown(name) if name != '' else 'empty'}, which is no id")
        return name

    def _content(self, value: Any) -> dict[str, Any]:
        """The prompt's ``text`` or ``messages``."""
        if not isinstance(value, str):
            return {"messages": conversation(value)}
        if not value:
            raise Unreadable("is empty")
        text = plain_text(value) + self._instruction
        if self._as_chat:
            return {"messages": ({"role": "user", "content": text},)}
        return {"text": text}
