"""``rollout(...)`` builds one; the tests then run stages, change weights, stop and restore it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rollouts import Rollout

from copris_lightning.engines.virtual_time import VirtualClockLoop


@pytest.fixture
def rollout() -> Iterator[Callable[..., Rollout]]:
    """Makes rollouts, and closes them after the test."""
    made: list[Rollout] = []

    def make(**settings: Any) -> Rollout:
        made.append(Rollout(**settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def loop() -> Iterator[VirtualClockLoop]:
    """An event loop on virtual time."""
    made = VirtualClockLoop()
    yield made
    leftovers = asyncio.all_tasks(made)
    made.close()
    assert not leftovers
