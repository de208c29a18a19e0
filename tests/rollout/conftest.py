"""``rollout(...)`` builds one; the tests then run stages, change weights, stop and restore it."""

from __future__ import annotations

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
