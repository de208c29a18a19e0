"""The house as docs/architecture.md draws it: which room may import which, and how large parts are.

Read from the source, imports within functions too: a lazy import is an arrow as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "copris_lightning"
BENCHMARKS = TESTS.parent / "benchmarks"

BELOW = {
    "cli": {"callbacks", "datamodules", "policy", "rollout", "engines", "weights", "runs", "core"},
    "quickstart": {"rollout", "core"},
    "callbacks": {"datamodules", "policy", "rollout", "engines", "weights", "runs", "core"},
    "datamodules": {"policy", "rollout", "engines", "weights", "runs", "core"},
    "policy": {"weights", "core"},
    "rollout": {"engines", "core"},
    "engines": {"weights", "core"},
    "weights": {"core"},
    "runs": set(),
    "core": set(),
}
"""What a room may import besides itself and the ground floor. `cli` is the files at the top."""

GROUND = {"errors", "directories", "search_path", "trainer_parts"}
"""Modules that every room may import; they import no room."""

TOP = {"cli", "config_files", "keys", "parsing", "serve", "simulate"}
"""Modules of the command line."""

FRAMEWORKS = {"lightning", "transformers", "vllm", "aiohttp", "datasets", "yaml", "tensorboard"}
"""What `core` knows nothing of."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def rooms_of(path: Path) -> set[str]:
    """Rooms and modules of the ground floor that a module imports."""
    names = [name.split(".") for name in imported(path)]
    return {parts[1] for parts in names if parts[0] == "copris_lightning" and len(parts) > 1}


def test_every_room_is_known() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(BELOW) - {"cli"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    name = room(path)
    if name == "__init__":  # the public names, imported on first use
        return
    inside = rooms_of(path)
    if name in GROUND:
        assert inside <= GROUND
    elif name in BELOW and name not in TOP:
        assert inside <= BELOW[name] | GROUND | {name}
    else:
        assert inside <= BELOW["cli"] | GROUND | TOP


def test_core_knows_no_framework() -> None:
    for path in (PACKAGE / "core").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & FRAMEWORKS, path


def test_only_its_engines_and_its_transport_import_vllm() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if any(name.split(".")[0] == "vllm" for name in imported(path))
    }
    assert found <= {
        *(str(path.relative_to(PACKAGE)) for path in (PACKAGE / "engines").glob("vllm*.py")),
        "weights/vllm_transfer.py",
        "serve.py",
    }


# ---------------------------------------------------------------- counts

LIMITS = {
    "lines": 350,
    "lines of a function": 60,
    "parameters": 8,
    "names on self": 12,
    "files with temperature": 5,
    "YAML keys": 0,
    "lines of a test file": 400,
}
"""What is easy to read, as numbers. A limit in the way says that a part has more than one reason
to change: give it a name of its own, do not squeeze it."""

YAML_KEY = re.compile(r"\b(?:data|model|engine)\.init_args\b|\btrainer\.(?=[a-z_])")
"""What the command line alone knows: settings name themselves relative to themselves."""


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(one is not None and one.arg not in ("self", "cls") for one in named)


def assigned_on_self(owner: ast.ClassDef) -> int:
    return len(
        {
            node.attr
            for node in ast.walk(owner)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    )


def counts_within(tree: ast.AST, place: str) -> Iterator[tuple[str, str, int]]:
    """``(limit, place, value)`` of each function and class, by its name after the ``place``."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from counts_within(node, place)
            continue
        inner = f"{place}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield "names on self", inner, assigned_on_self(node)
        else:
            assert node.end_lineno is not None
            yield "lines of a function", inner, node.end_lineno - node.lineno + 1
            yield "parameters", inner, parameters(node)
        yield from counts_within(node, inner)


def counts() -> Iterator[tuple[str, str, int]]:
    """``(limit, place, value)`` of all that has a limit."""
    with_temperature = 0
    for path in modules():
        place, text = str(path.relative_to(PACKAGE)), path.read_text()
        yield "lines", place, len(text.splitlines())
        yield from counts_within(ast.parse(text), place)
        if room(path) in ("core", "engines", "rollout"):
            yield "YAML keys", place, len(YAML_KEY.findall(text))
        with_temperature += bool(re.search(r"\btemperature\b", text))
    yield "files with temperature", "the package", with_temperature
    for path in sorted(BENCHMARKS.glob("*.py")):
        place, text = f"benchmarks/{path.name}", path.read_text()
        yield "lines", place, len(text.splitlines())
        yield from counts_within(ast.parse(text), place)
    for path in sorted(TESTS.rglob("*.py")):
        place = str(path.relative_to(TESTS.parent))
        yield "lines of a test file", place, len(path.read_text().splitlines())


def test_nothing_is_too_large_to_be_read() -> None:
    over = {f"{limit}: {place}": n for limit, place, n in counts() if n > LIMITS[limit]}
    assert not over, f"the limits are {LIMITS}"
