"""A reward in a module of its own, so that its process has nothing else to import."""

from __future__ import annotations

from typing import Any


async def reward(response: str, prompt: Any) -> float:
    """Takes no time."""
    return 1.0
