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

COMING = {
    "engines/engine.py::Engine.hold",
    "engines/engine.py::Engine.release",
    "engines/vllm.py::VLLMEngine.stream",
    "engines/vllm_worker.py::CoprisWorkerExtension.load_shard",
    "rollout/episode.py::Episode",
    "rollout/episode.py::Episode.go_on",
    "rollout/figures.py::TokenBalance",
    "rollout/scheduler.py::RolloutScheduler.take",
    "rollout/shared_engine.py::SharedEngine",
    "rollout/shared_engine.py::SharedEngine.hold",
    "tests/weights/test_files.py::test_a_send_takes_one_shard_of_host_memory",
    "tests/weights/test_files.py::test_a_set_is_finished_whichever_shard_the_engine_dies_at",
    "weights/files.py::FilesTransport.send",
    "weights/kept.py::KeptSet.write",
    "weights/transport.py::Transport",
    "weights/transport.py::Transport.send",
}
"""What the page names and the floor above `core` brings: out of here as soon as it is there."""


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
    assert there or f"{path}::{name}".rstrip(":") in COMING


def test_the_page_draws_every_room() -> None:
    drawing = PAGE.partition("```\n")[2].partition("```")[0]
    assert ROOMS - {"quickstart", "runs"} <= set(re.findall(r"\w+", drawing))
