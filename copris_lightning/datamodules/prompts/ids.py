"""Prompt ids are unique within a source: ledger, errors and checkpoints name prompts by them."""

from __future__ import annotations

from collections.abc import Iterable

from copris_lightning.errors import ConfigurationError


def check_ids(ids: Iterable[tuple[int, str]], key: str) -> None:
    """Refuse a source in which two prompts have the same id.

    Equal ids in two sources, such as training and validation, are no harm.

    Args:
        ids: each prompt's row in its source and its id.
        key: the name of the source.

    Raises:
        ConfigurationError: names the ids and their rows.
    """
    rows: dict[str, list[int]] = {}
    for row, name in ids:
        rows.setdefault(name, []).append(row)
    doubled = {name: found for name, found in rows.items() if len(found) > 1}
    if not doubled:
        return
    shown = "; ".join(
        f"{name!r} in rows {', '.join(map(str, found[:4]))}{', ...' if len(found) > 4 else ''}"
        for name, found in list(doubled.items())[:3]
    )
    raise ConfigurationError(
        f"{key}: {len(doubled)} {'id is' if len(doubled) == 1 else 'ids are'} not unique: {shown}"
        f"{'; ...' if len(doubled) > 3 else ''} (counted from 0). Ledger and checkpoints name "
        f"prompts by id: choose another {key}.columns.id, or leave it out to use the row"
    )
