"""The figures of docs/simulate.md are what its commands print, and the paper's within 5 %."""

from __future__ import annotations

import re
import shlex
import statistics
from pathlib import Path

import pytest

from copris_lightning.__main__ import main
from copris_lightning.core.timing.calibration import Measured, calibrate
from copris_lightning.core.timing.comparison import SYNC, Comparison
from copris_lightning.core.timing.costs import Costs
from copris_lightning.core.timing.cycles import Flow, Sizes
from copris_lightning.core.timing.lengths import Draws, LogNormal

PAGE = (Path(__file__).parents[1] / "docs" / "simulate.md").read_text()
SHOWN = re.findall(r"```bash\n(copris simulate [^\n]*)\n```\n\n```text\n(.*?)```", PAGE, re.S)

PAPER = {8192: 1.25, 16384: 1.54, 24576: 1.75, 32768: 2.0, 40960: 2.27}
"""Times faster than synchronous RL, by the limit on responses (arXiv 2511.05589)."""

ENDS = {limit: PAPER[limit] for limit in (8192, 40960)}


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=["small", "paper", "caps"])
def test_commands_print_what_the_page_shows(
    command: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == output


def test_the_papers_table_is_what_its_command_prints() -> None:
    [(command, output)] = [shown for shown in SHOWN if "--measured" in shown[0]]
    assert f"--measured '{ENDS}'" in command
    printed = re.findall(r"^ +(\d+) +1024 .*? s +1\.00x .*? s +([\d.]+)x", output, re.M)
    found = {int(limit): float(gain) for limit, gain in printed}
    assert found == pytest.approx(PAPER, rel=0.05)
    assert re.findall(r"^\| \d+ \|.*$", PAGE, re.M) == [
        f"| {limit} | {gain:.2f} | {found[limit]:.2f} | "
        + ("fitted |" if limit in ENDS else f"{100 * (found[limit] / gain - 1):+.1f} % |")
        for limit, gain in PAPER.items()
    ]


def test_the_papers_lengths_have_the_mean_that_the_page_says() -> None:
    draws = Draws(LogNormal(6000.0, 1.0), 8)
    mean = statistics.fmean(length for i in range(4000) for length in draws.group(i, 8192))
    assert mean == pytest.approx(5500, rel=0.02)


@pytest.mark.parametrize(("median", "sigma"), [(4000.0, 1.0), (8000.0, 1.0), (6000.0, 0.8)])
def test_other_lengths_predict_the_papers_other_points_as_well(median: float, sigma: float) -> None:
    sizes = Sizes(groups=64, group_size=8, limit=max(PAPER), prompt=100)
    comparison = Comparison(LogNormal(median, sigma), sizes, Costs())
    work = {
        limit: [comparison.cycle(flow, 1024, limit).work for flow in (SYNC, Flow())]
        for limit in PAPER
    }
    points = [Measured(PAPER[limit], *work[limit]) for limit in ENDS]
    costs = calibrate(points, Costs(step_s=0.008))
    found = {
        limit: sync.seconds(costs) / staged.seconds(costs) for limit, (sync, staged) in work.items()
    }
    assert found == pytest.approx(PAPER, rel=0.05)
    assert {limit: found[limit] for limit in ENDS} == pytest.approx(ENDS)
