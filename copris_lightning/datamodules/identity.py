"""Whether a data set is the one that it was: a digest per prompt, in order."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import pathlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from copris_lightning.rollout.task import QueuedPrompt

_SIZE = 8
_PLAIN_REPR = (
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction),
    *(uuid.UUID, pathlib.PurePath, enum.Enum, range, complex),
)
"""Types whose ``repr`` says all of the value, and is the same in every process."""


@dataclass(frozen=True)
class DataIdentity:
    """Digests of a data set's prompts, in the order in which indices count them.

    Attributes:
        contents: of what rewards see of each prompt ``[N, 8]``, bytes.
        tokens: of what the engine sees ``[N, 8]``, bytes.
        rows: of the indices at which the source has them ``[1, 8]``, bytes.
        opaque: types of values that have no canonical form and are in no digest.
    """

    contents: Tensor
    tokens: Tensor
    rows: Tensor
    opaque: tuple[str, ...] = ()

    @classmethod
    def of(cls, prompts: Iterable[QueuedPrompt]) -> DataIdentity:
        """Of encoded prompts; goes through them once."""
        contents, tokens = bytearray(), bytearray()
        rows = blake2b(digest_size=_SIZE)
        opaque: set[str] = set()
        for queued in prompts:
            digest = blake2b(digest_size=_SIZE)
            fields = dataclasses.fields(queued.prompt)
            values = {field.name: getattr(queued.prompt, field.name) for field in fields}
            _feed(digest, values, opaque)
            rows.update(b"%d," % queued.index)
            contents += digest.digest()
            tokens += blake2b(repr(queued.token_ids).encode(), digest_size=_SIZE).digest()
        return cls(_table(contents), _table(tokens), _table(rows.digest()), tuple(sorted(opaque)))

    def state_dict(self) -> dict[str, Tensor]:
        """About 16 bytes per prompt; the inverse is :meth:`from_state`."""
        return {"contents": self.contents, "tokens": self.tokens, "rows": self.rows}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> DataIdentity:
        """What :meth:`state_dict` gave."""
        return cls(state["contents"], state["tokens"], state["rows"])

    def difference(self, saved: DataIdentity, prompts: Iterable[QueuedPrompt]) -> str | None:
        """The first prompt that is not what it was, in words; ``None`` if all are.

        Args:
            saved: what it was.
            prompts: this identity's, again; to name one of them.
        """
        before, now = len(saved.contents), len(self.contents)
        shared = min(before, now)
        same = (self.contents[:shared] == saved.contents[:shared]).all(dim=1)
        same_tokens = (self.tokens[:shared] == saved.tokens[:shared]).all(dim=1)
        changed = (~(same & same_tokens)).nonzero()
        counts = f"there were {before} prompts, and there are {now}"
        if not len(changed):
            if before == now and torch.equal(self.rows, saved.rows):
                return None
            if before == now:
                return "they are the same, but stand in other rows, among others that are left out"
            if now < before:
                return f"{counts}: those from number {now} on are gone"
            return f"{counts}: {_name(prompts, shared)} and those after it are new"
        place = int(changed[0])
        name = _name(prompts, place)
        if same[place]:
            return f"{name} has other tokens: another tokenizer, chat template or template setting"
        stays = "" if before == now else f"; {counts}"
        old, new = _keys(saved.contents), _keys(self.contents)
        was, is_now = old[place], new[place]
        if is_now not in old and was in new:
            return f"{name} is new at its place{stays}"
        if is_now in old and was not in new:
            gone = f"what stood in the place of {name} is gone, and that was number"
            return f"{gone} {old.index(is_now)}{stays}"
        if is_now in old:
            return f"{name} was number {old.index(is_now)}: the order is another{stays}"
        return f"{name} is not what it was (its id, text, answer or another column){stays}"


def _name(prompts: Iterable[QueuedPrompt], place: int) -> str:
    queued = next(islice(prompts, place, None))
    return f"prompt {queued.prompt.id!r} (row {queued.index})"


def _table(digests: bytes | bytearray) -> Tensor:
    return torch.tensor(list(digests), dtype=torch.uint8).reshape(-1, _SIZE)


def _keys(rows: Tensor) -> list[int]:
    """A digest as an integer, for sets."""
    keys: list[int] = rows.contiguous().view(torch.int64)[:, 0].tolist()
    return keys


def _feed(digest: Any, value: Any, opaque: set[str], depth: int = 0) -> None:
    """Add a value to a digest, so that different values add different bytes.

    Dictionaries and sets are added in the order of their items' digests: readers of data sets do
    not promise another.
    """
    kind = type(value)
    if depth > 100:  # deeper than any reader of JSON goes; or it contains itself
        return _add(digest, kind, _opaque(kind, opaque))
    if value is None or kind in (bool, int, float):
        return _add(digest, kind, repr(value).encode())
    if isinstance(value, str):
        return _add(digest, str, value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes | bytearray | memoryview):
        return _add(digest, bytes, bytes(value))
    if isinstance(value, dict):
        items = [_item(item, opaque, depth) for item in value.items()]
        return _add(digest, dict, b"".join(sorted(items)))
    if isinstance(value, set | frozenset):
        return _add(digest, set, b"".join(sorted(_item(v, opaque, depth) for v in value)))
    if isinstance(value, list | tuple):
        _add(digest, tuple, str(len(value)).encode())
        for item in value:
            _feed(digest, item, opaque, depth + 1)
        return None
    if isinstance(value, _PLAIN_REPR):
        return _add(digest, kind, repr(value).encode())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(digest, kind, b"")
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _feed(digest, fields, opaque, depth + 1)
    if callable(getattr(value, "tolist", None)):  # arrays and tensors
        _add(digest, kind, str(getattr(value, "dtype", "")).encode())
        return _feed(digest, value.tolist(), opaque, depth + 1)
    return _add(digest, kind, _opaque(kind, opaque))


def _item(value: Any, opaque: set[str], depth: int) -> bytes:
    digest = blake2b(digest_size=16)
    _feed(digest, value, opaque, depth + 1)
    return digest.digest()


def _add(digest: Any, kind: type, content: bytes) -> None:
    digest.update(f"{kind.__name__}:{len(content)}:".encode())
    digest.update(content)


def _opaque(kind: type, opaque: set[str]) -> bytes:
    opaque.add(f"{kind.__module__}.{kind.__qualname__}")
    return b"?"
