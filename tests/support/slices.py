"""Tests that boot engines: of each slice only some run by default, others every day.

A boot takes longer than most tests together. So what boots an engine of its own bears the marker of
a slice, which has a make target (``make test-engines``, ...), and a run of the whole suite has
:data:`A_DAY` of each, drawn by the date.
"""

from __future__ import annotations

import datetime
import random

import pytest

A_DAY = {"engines": 4, "kills": 1, "models": 1, "deepspeed": 0}
"""Slices, and how many tests of each a run of the whole suite has."""

LONG = ("kills", "models", "deepspeed")
"""Slices of which nothing runs where a file or test is named, unless ``-m`` names the slice."""

FIXTURES = {"running_vllm": 1, "servers": 2}
"""Fixtures that boot engines, once for all who use them, and how many."""


def left_out(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """What a run of the collected tests does without."""
    asked = config.option.markexpr
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    dropped: list[pytest.Item] = []
    for name, number in A_DAY.items():
        cells = [item for item in items if item.get_closest_marker(name)]
        if name in asked or not (is_whole or name in LONG):
            continue
        chosen = random.Random(f"{name} {datetime.date.today()}").sample(
            cells, min(number, len(cells)) if is_whole else 0
        )
        dropped += [item for item in cells if item not in chosen]
    return dropped


def of_today(items: list[pytest.Item]) -> list[str]:
    """The cells of slices among the tests that are run."""
    return [item.nodeid for item in items if any(map(item.get_closest_marker, A_DAY))]


def boots(items: list[pytest.Item]) -> int:
    """Engine boots that the tests take, each server's counted."""
    shared = {name for item in items for name in getattr(item, "fixturenames", ())}
    total = sum(number for name, number in FIXTURES.items() if name in shared)
    for item in items:
        marker = item.get_closest_marker("boots")
        if marker is not None:
            total += marker.args[0]
        elif any(map(item.get_closest_marker, ("engines", "kills", "models"))):
            total += 1
    return total
