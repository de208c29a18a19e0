"""What rewards print is shown, and does not flood the console."""

from __future__ import annotations

import asyncio
import io
import re
import sys

import pytest
from some_rewards import DoesWhatItIsTold

from copris_lightning.errors import RewardError
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring

PRINTS = "value [print(f'line {n} of {0}') for n in range(%d)] and None"


def shown(capfd, *responses, **settings) -> str:
    """What is on the console after some calls, one after the other."""
    scorer = RewardScorer(Scoring(DoesWhatItIsTold(), **settings))

    async def several():
        for response in responses:
            try:
                await scorer(response, Prompt("p", text=""))
            except RewardError as error:
                print(error)

    asyncio.run(several())
    scorer.close()
    return "".join(capfd.readouterr())


def test_a_few_lines_are_shown_as_they_are(capfd):
    errors = "value print('a warning', file=__import__('sys').stderr)"
    program = "value __import__('os').system('echo a program') and None"
    output = shown(capfd, PRINTS % 3, errors, program)
    assert output.splitlines() == [
        *(f"line {n} of 0" for n in range(3)),
        "a warning",
        "a program",
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_of_a_flood_some_lines_are_shown_and_the_rest_is_counted(capfd, workers):
    output = shown(capfd, *[PRINTS % 1000] * 30, workers=workers)
    lines = output.splitlines()
    assert lines[0] == "line 0 of 0"
    told = [int(n) for n in re.findall(r"DoesWhatItIsTold printed (\d+) lines more", output)]
    assert len(lines) - len(told) + sum(told) == 30_000
    assert len(lines) < 200  # some 20 in 10 s


def test_what_a_worker_printed_last_is_shown_before_its_end_is_told(capfd):
    last = "value __import__('os').write(2, b'no memory') and __import__('os')._exit(9)"
    output = shown(capfd, last)
    assert output.splitlines()[-1] == "no memory"
    assert "exit code 9" in output


def test_a_long_line_is_cut(capfd):
    output = shown(capfd, "value print('x' * 10_000_000)", "value print('and on')")
    assert len(output) < 3000
    assert "..." in output
    assert output.splitlines()[-1] == "and on"


def test_a_reward_may_close_what_it_prints_to(capfd):
    closing = "value __import__('os').closerange(1, 3)"
    assert shown(capfd, closing, "value 1", "value 2") == ""


def test_it_does_not_matter_if_nothing_can_be_shown(capfd, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert shown(capfd, PRINTS % 1000, "value 1") == ""
