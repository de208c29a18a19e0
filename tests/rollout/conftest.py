"""``rollout(...)`` builds one; the tests then run stages, change weights, stop and restore it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rollouts import Rollout


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
def rollout_threads() -> Callable[[], list[threading.Thread]]:
    """Those of the test that are alive now; the session's engine may have one of its own."""
    before = set(threading.enumerate())
    return lambda: [
        thread
        for thread in threading.enumerate()
        if thread.name == "copris-rollout" and thread not in before
    ]
