"""Config files on top of each other: evaluations add up by name.

The parser merges what two files say about an evaluation, but of a mapping it keeps the names of the
last file only: an overlay that adds an evaluation would silently drop the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def with_all_evaluations(args: Sequence[str]) -> list[str]:
    """A command line whose later config files also name the evaluations of the earlier ones.

    Args:
        args: of the command line; its config files have been checked.
    """
    found: list[str] = []
    names: dict[str, None] = {}
    is_config = False
    for arg in args:
        option, _, inline = arg.partition("=")
        value = arg if is_config else inline if option in ("--config", "-c") else ""
        is_config = arg in ("--config", "-c")
        whole = _completed(value, names) if value else None
        found.append(arg if whole is None else f"{arg.removesuffix(value)}{whole}")
    return found


def _completed(path: str, names: dict[str, None]) -> str | None:
    """What to read in the place of a file that does not name all evaluations so far."""
    if not Path(path).is_file():
        return None
    content = yaml.safe_load(Path(path).read_text("utf-8"))
    evaluations = _evaluations(content)
    lacking = [name for name in names if name not in evaluations]
    names |= dict.fromkeys(evaluations)
    if not evaluations or not lacking:
        return None
    evaluations.update({name: {} for name in lacking})
    return json.dumps(content)


def _evaluations(content: Any) -> dict[str, Any]:
    """Of a config, to be changed; none where there are none."""
    for key in ("data", "init_args", "evaluations"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}
