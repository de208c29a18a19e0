"""The environment that an engine's processes start in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_SOCKETS = "VLLM_RPC_BASE_PATH"
_LONGEST_PATH = 65
"""Of the directory of a socket, in characters: vLLM adds 37, and a path may have 107."""


def sockets(directory: Path | None) -> dict[str, str]:
    """Variables that have vLLM make its sockets, which it leaves behind, in a directory that is
    removed; none if somebody chose another, or its path is too long."""
    if directory is None or _SOCKETS in os.environ or len(str(directory)) > _LONGEST_PATH:
        return {}
    return {_SOCKETS: str(directory)}


@contextmanager
def exported(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables for the processes started inside; ``None`` unsets."""
    before = {name: os.environ.get(name) for name in variables}

    def apply(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    apply(variables)
    try:
        yield
    finally:
        apply(before)
