"""Which tests a run leaves to other days, and how many engines it says to have booted."""

from __future__ import annotations

import datetime

import pytest
from slices import boots, boots_at_most, drawn, of_slice

SUITE = """
import pytest

@pytest.fixture(scope="module")
def servers(): ...

def test_plain(): ...

def test_on_two_servers(servers): ...

@pytest.mark.boots(1)
def test_a_fit(): ...

@pytest.mark.engines
@pytest.mark.parametrize("i", range(5))
def test_engine(i): ...

@pytest.mark.engines
@pytest.mark.boots(2)
def test_two_engines(): ...

@pytest.mark.kills
@pytest.mark.parametrize("i", range(5))
def test_kill(i): ...

@pytest.mark.deepspeed("stage_3")
def test_ranks(): ...
"""

SETTINGS = """
[pytest]
testpaths = .
addopts = --strict-markers
markers =
    boots(n)
    engines
    kills
    models
    deepspeed
"""


# A session within a session is slow where much is loaded, so without what these do not need.
LIGHT = [f"-pno:{name}" for name in ("cacheprovider", "unraisableexception", "threadexception")]


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A small suite with slices, in a directory of its own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile(test_small=SUITE)
    pytester.makeini(SETTINGS)
    return pytester


@pytest.fixture
def items(suite: pytest.Pytester) -> list[pytest.Item]:
    """All tests of the small suite."""
    collected, _ = suite.inline_genitems(*LIGHT)
    return collected


def run(suite: pytest.Pytester, *args: str) -> tuple[list[str], str]:
    """Names of the tests that ran, and what was printed."""
    result = suite.runpytest_inprocess("-p", "slices", "-v", *LIGHT, *args)
    assert result.ret == 0
    lines = [line.split("::")[1].split()[0] for line in result.outlines if "PASSED" in line]
    return lines, result.stdout.str()


def test_the_whole_suite_has_one_of_each_slice_and_says_which(suite: pytest.Pytester) -> None:
    ran, printed = run(suite)
    assert {"test_plain", "test_on_two_servers", "test_a_fit", "test_ranks"} <= set(ran)
    [engine] = [name for name in ran if name.startswith(("test_engine", "test_two_engines"))]
    [kill] = [name for name in ran if name.startswith("test_kill")]
    for name in (engine, kill, "test_ranks"):
        assert f"of a slice: test_small.py::{name}" in printed
    assert printed.count("of a slice") == 3
    assert len(ran) == 6
    # Two servers, the fit, one that is killed, and that of the slice `engines`.
    expected = 4 + (2 if engine == "test_two_engines" else 1)
    assert f"{expected} engine boots, each server's counted" in printed


def test_a_slice_that_is_asked_for_runs_whole(suite: pytest.Pytester) -> None:
    ran, _ = run(suite, "-m", "kills")
    assert len(ran) == 5


def test_a_file_that_is_named_runs_but_for_what_is_long(suite: pytest.Pytester) -> None:
    ran, _ = run(suite, "test_small.py")
    assert len([name for name in ran if "engine" in name]) == 6
    assert not [name for name in ran if "kill" in name or "ranks" in name]


def test_a_suite_that_would_boot_too_many_on_some_day_is_refused(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_more="import pytest\n@pytest.mark.engines\n@pytest.mark.boots(6)\ndef test_six(): ..."
    )
    result = suite.runpytest_inprocess("-p", "slices", *LIGHT)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*would boot 10 engines on some day, more than 9*"])


@pytest.mark.parametrize("name", ["engines", "kills"])
def test_every_one_has_its_day_and_a_day_is_the_same_throughout(
    items: list[pytest.Item], name: str
) -> None:
    cells = of_slice(name, items)
    assert len(cells) == {"engines": 6, "kills": 5}[name]
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(i) for i in range(60)]
    assert {drawn(name, cells, day) for day in days} == set(cells)
    for day in days:
        assert drawn(name, cells, day) is drawn(name, cells[::-1], day)


def test_boots_are_those_of_tests_and_of_the_fixtures_that_they_share(
    items: list[pytest.Item],
) -> None:
    assert boots(of_slice("engines", items)) == 5 + 2
    assert boots(of_slice("kills", items)) == 5
    assert boots(of_slice("deepspeed", items)) == 0
    assert boots([item for item in items if "servers" in item.name]) == 2
    # On the worst day: two servers, the fit, two engines, and one that is killed.
    assert boots_at_most(items) == 6
