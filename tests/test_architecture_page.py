"""docs/architecture.md names files, what is defined in them, and tests: all of them exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:\w+/)*\w+\.py)(?:::([\w.]+))?`", PAGE)))
ROOMS = {path.parent.name for path in (ROOT / "copris_lightning").glob("*/__init__.py")}


def is_defined(file: Path, name: str) -> bool:
    """Whether a file defines ``Class.method`` or a function, at its top or in that class."""
    within: list[ast.stmt] = ast.parse(file.read_text()).body
    for part in name.split("."):
        found = [
            node
            for node in within
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.name == part
        ]
        if not found:
            return False
        within = found[0].body
    return True


@pytest.mark.parametrize(("path", "name"), NAMED, ids=["::".join(n).rstrip(":") for n in NAMED])
def test_what_the_page_names_is_there(path: str, name: str) -> None:
    file = ROOT / path if path.startswith("tests/") else ROOT / "copris_lightning" / path
    there = file.exists() and (not name or is_defined(file, name))
    assert there


def test_the_page_draws_every_room() -> None:
    drawing = PAGE.partition("```\n")[2].partition("```")[0]
    assert ROOMS - {"quickstart", "runs"} <= set(re.findall(r"\w+", drawing))
