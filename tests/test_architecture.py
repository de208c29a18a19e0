"""The house as docs/architecture.md draws it: which room may import which.

Read from the source, imports within functions too: a lazy import is an arrow as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "copris_lightning"

BELOW = {
    "cli": {"callbacks", "datamodules", "policy", "rollout", "engines", "weights", "runs", "core"},
    "quickstart": {"rollout"},
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

TOP = {"cli", "config_files", "keys", "parsing", "serve"}
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
