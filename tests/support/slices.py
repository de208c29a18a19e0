"""Tests too long for every run: a run of the whole suite has one of each slice, by the date.

A boot of vLLM takes longer than most tests together, and so do two ranks under DeepSpeed. What
needs such a start of its own bears the marker of a slice, which has a make target that runs all of
it (``make test-engines``, ...). Of each slice the whole suite runs one test, another every day.

This is a plugin: it draws, and after the tests it says what it drew and how many engines they
booted, each server's counted. More than :data:`MOST_BOOTS` on any day are refused.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterable, Sequence

import pytest

SLICES = {"engines": 1, "kills": 1, "models": 1, "deepspeed": 0}
"""The slices, and how many engines a test of each boots if its marker ``boots`` does not say."""

LONG = ("kills", "models", "deepspeed")
"""Slices of which nothing runs where a file or test is named, unless ``-m`` names the slice."""

FIXTURES = {"running_vllm": 1, "servers": 2}
"""Fixtures that boot engines, once for all who use them, and how many."""

MOST_BOOTS = 9
"""Of the whole suite, on any day."""

SELECTED = pytest.StashKey[list[pytest.Item]]()


def slice_of(item: pytest.Item) -> str | None:
    """The slice that a test belongs to."""
    return next((name for name in SLICES if item.get_closest_marker(name)), None)


def of_slice(name: str, items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Those of the tests that belong to a slice."""
    return [item for item in items if slice_of(item) == name]


def drawn(name: str, cells: Sequence[pytest.Item], day: datetime.date) -> pytest.Item:
    """A slice's test of the day: the same all day and on every machine."""
    ordered = sorted(cells, key=lambda cell: cell.nodeid)
    return ordered[random.Random(f"{name} {day}").randrange(len(ordered))]


def left_out(config: pytest.Config, items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """What a run of the collected tests does without."""
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    dropped: set[pytest.Item] = set()
    for name in SLICES:
        cells = of_slice(name, items)
        if name in config.option.markexpr or not cells or not (is_whole or name in LONG):
            continue
        dropped |= set(cells)
        if is_whole:
            dropped.remove(drawn(name, cells, datetime.date.today()))
    return dropped


def own_boots(item: pytest.Item) -> int:
    """Engines that a test boots for itself alone."""
    marker = item.get_closest_marker("boots")
    if marker is not None:
        return int(marker.args[0])
    return SLICES.get(slice_of(item) or "", 0)


def shared_boots(items: Iterable[pytest.Item]) -> int:
    """Engines that the tests boot together."""
    used = {name for item in items for name in getattr(item, "fixturenames", ())}
    return sum(number for name, number in FIXTURES.items() if name in used)


def boots(items: Sequence[pytest.Item]) -> int:
    """Engine boots that the tests take, each server's counted."""
    return shared_boots(items) + sum(map(own_boots, items))


def boots_at_most(items: Sequence[pytest.Item]) -> int:
    """The same of the whole suite, on the day that draws the dearest of each slice."""
    always = [item for item in items if slice_of(item) is None]
    dearest = (max(map(own_boots, of_slice(name, items)), default=0) for name in SLICES)
    return shared_boots(items) + sum(map(own_boots, always)) + sum(dearest)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to a slice, but for the tests of the day."""
    if boots_at_most(items) > MOST_BOOTS:
        raise pytest.UsageError(
            f"the suite would boot {boots_at_most(items)} engines on some day, more than "
            f"{MOST_BOOTS}: share one, or mark a test as one of a slice"
        )
    dropped = left_out(config, items)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]
    config.stash[SELECTED] = list(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which tests of slices ran, and how many engines were booted."""
    items = terminalreporter.config.stash.get(SELECTED, [])
    number = boots(items)
    if number:
        terminalreporter.section(f"{number} engine boots, each server's counted")
    for item in items:
        if slice_of(item) is not None:
            terminalreporter.write_line(f"of a slice: {item.nodeid}")
