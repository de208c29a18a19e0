"""Values of a data set as text: an answer is what its source wrote, not what a type made of it."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of lists and objects that is taken. Copies that go to the reward's processes are
made recursively, and Python's own limit would end the run there."""


class Number(str):
    """A number of a JSON file, in the digits that stand there."""

    __slots__ = ()


class Unreadable(ValueError):
    """Why a value cannot be used; a predicate, such as "is null"."""


def parse_json(text: str) -> Any:
    """A JSON value, its numbers as :class:`Number`.

    Raises:
        Unreadable: it is none, or names a key twice.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"is no JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise Unreadable(f"is nested deeper than {MAX_DEPTH} levels") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Unreadable(f"names the key {doubled([key for key, _ in pairs])!r} twice")
    return found


# Not strict: a tab within a string is told from its end all the same.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=Number,
    parse_float=Number,
    parse_constant=Number,
    strict=False,
)


def doubled(names: list[str]) -> str | None:
    """The first name that stands there a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def text_of(value: Any, depth: int = 0) -> Any:
    """The value with its leaves as text.

    Args:
        value: of JSON, its numbers as :class:`Number`; or a cell of a CSV file.
        depth: of the value within the cell.

    Returns:
        text for a scalar (a number's literal, ``true`` and ``false``, a string as it is), the
        structure of a list or an object, ``None`` for ``null``.

    Raises:
        Unreadable: it is nested too deeply, or holds what is no text.
    """
    _check_depth(depth)
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, list):
        return [text_of(item, depth + 1) for item in value]
    assert isinstance(value, dict), value
    return {plain_text(key): text_of(item, depth + 1) for key, item in value.items()}


def value_of(value: Any, depth: int = 0) -> Any:
    """The value as JSON means it: integers as ``int``, other numbers as ``float``.

    Raises:
        Unreadable: it is nested too deeply, or an integer is too long for Python to read.
    """
    _check_depth(depth)
    if isinstance(value, Number):
        if not value.removeprefix("-").isdigit():
            return float(value)
        try:
            return int(value)
        except ValueError:
            raise Unreadable(f"holds an integer of {len(value)} digits") from None
    if isinstance(value, list):
        return [value_of(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: value_of(item, depth + 1) for key, item in value.items()}
    return value


def shown(value: Any) -> str:
    """What a value is, for errors: short, whatever it holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | Number):
        text = str(value) if not isinstance(value, int) or value.bit_length() < 200 else "..."
        return f"the number {text[:40]}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def plain_text(text: str) -> str:
    """The text, if it is one: files can spell halves of a character.

    Raises:
        Unreadable: it cannot be written as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise Unreadable(f"holds {half}, half of a character") from None
    return str(text)


def arrow_text(scalar: Any) -> Any:
    """:func:`text_of` for a typed value of Parquet, Arrow or the hub (a ``pyarrow.Scalar``).

    Floats are the shortest text that reads back as the same value *of their type*; decimals keep
    their digits; dates, times and timestamps are ISO 8601.

    Raises:
        Unreadable: bytes, durations, or a date that the calendar does not have.
    """
    import pyarrow as pa

    kind, types = scalar.type, pa.types
    if not scalar.is_valid:
        return None
    if types.is_boolean(kind):
        return "true" if scalar.as_py() else "false"
    if types.is_integer(kind):
        return str(scalar.as_py())
    if types.is_floating(kind):
        return _float_text(scalar)
    if types.is_decimal(kind):
        return format(scalar.as_py(), "f")
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return plain_text(scalar.as_py())
    if types.is_time(kind):
        return scalar.cast(pa.string()).as_py()
    if types.is_date(kind) or types.is_timestamp(kind):
        return _date_text(scalar)
    return _nested_text(scalar)


def _nested_text(scalar: Any) -> Any:
    import pyarrow as pa

    kind = scalar.type
    if isinstance(scalar, pa.ListScalar):
        return [arrow_text(item) for item in scalar.values]
    if isinstance(scalar, pa.StructScalar):
        return {plain_text(kind.field(i).name): arrow_text(scalar[i]) for i in range(len(kind))}
    if isinstance(scalar, pa.DictionaryScalar):
        return arrow_text(scalar.value)
    if isinstance(scalar, pa.ExtensionScalar):
        if kind.extension_name == "arrow.json":
            return text_of(parse_json(scalar.value.as_py()))
        return arrow_text(scalar.value)
    raise Unreadable(f"is of type {kind}, which has no text; convert the column")


def _float_text(scalar: Any) -> str:
    import numpy as np

    bits = scalar.type.bit_width
    value = scalar.as_py()
    if bits == 64:
        return repr(value)
    # Few enough digits that they are also the shortest of a double.
    return repr(float(str(np.dtype(f"float{bits}").type(value))))


def _date_text(scalar: Any) -> str:
    try:
        return str(scalar.as_py().isoformat())
    except (OverflowError, ValueError):
        raise Unreadable(f"is a {scalar.type} that no calendar has") from None


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise Unreadable(f"is nested deeper than {MAX_DEPTH} levels")
