"""Time is booked to one activity at a time, so that shares are of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from simulated_fits import build, ledger
from trajectories import trajectory

from copris_lightning.core.batching import collate
from copris_lightning.datamodules.cycle import ACTIVITIES, Cycle, Stopwatch
from copris_lightning.policy.flops import Work


class Clock:
    """Is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([*ACTIVITIES, None]),
        st.integers(0, 1000),
        st.sampled_from(["switch", "read", "move"]),
    )
)


@given(EVENTS)
def test_the_parts_are_the_whole_whatever_happens(events: list[tuple[Any, int, str]]) -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    expected, running = dict.fromkeys(ACTIVITIES, 0.0), None
    for activity, milliseconds, what in events:
        if what == "switch":
            watch.switch(activity)
            running = activity
        elif what == "read":
            watch.read()
        elif activity is not None:
            moved = min(milliseconds / 2000, expected[activity])
            watch.move(milliseconds / 2000, activity, "idle")
            expected[activity] -= moved
            expected["idle"] += moved
        clock.now += milliseconds / 1000
        if running is not None:
            expected[running] += milliseconds / 1000
    assert watch.read() == pytest.approx(expected, abs=1e-9)
    watch.lap()
    assert watch.read() == dict.fromkeys(ACTIVITIES, 0.0)


def test_a_lap_begins_where_the_last_one_ended() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 50.0  # it does not run yet
    with watch.during("rollout"):
        clock.now += 3.0
        watch.lap()
        clock.now += 2.0
    clock.now += 1.0
    watch.switch(None)
    clock.now += 70.0
    watch.switch("train")
    clock.now += 0.5
    watch.move(9.0, "train", "idle")  # no more than there is
    assert watch.lap() == {"rollout": 2.0, "score": 0, "train": 0.0, "sync": 0, "idle": 1.5}
    clock.now += 0.25
    assert watch.read()["train"] == 0.25


def test_work_is_counted_in_true_tokens_without_padding_and_placeholders() -> None:
    cycle = Cycle()
    rows = [trajectory((0, [5] * n, [0.0] * n)) for n in (3, 7)]
    cycle.score(rows)
    batch = collate(rows, source=None)
    cycle.train([batch, batch.placeholder()])
    lengths = [len(row.prompt) + row.response_length for row in rows]
    whole = Work(sum(lengths), 10, sum(length**2 for length in lengths))
    lap = cycle.end()
    assert lap.scored == lap.trained == whole
    assert cycle.end().trained == Work()


def test_a_batch_that_a_checkpoint_cut_is_counted_by_what_is_left_of_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def rates(steps: int, directory: Path, **options: Any) -> list[float]:
        found: list[float] = []

        class Keep(ModelCheckpoint):
            def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int):
                super().on_train_batch_end(trainer, module, out, batch, i)
                if batch.is_last:
                    figures = trainer.callback_metrics
                    found.append(float(figures["train/tokens_per_s"] * figures["time/cycle_s"]))

        keep = Keep(tmp_path, filename="cut", every_n_train_steps=1)
        trainer, module, data, _ = build(
            tiny_checkpoint,
            directory,
            callbacks=[keep],
            max_steps=steps,
            data={"updates": 2},
            enable_checkpointing=True,
        )
        trainer.fit(module, datamodule=data, **options)
        return found

    [first] = rates(3, tmp_path / "first")
    lengths = [row["response_tokens"] for row in ledger(tmp_path / "first")]
    assert first == pytest.approx(sum(lengths), rel=1e-5)
    second, third = rates(6, tmp_path / "first", ckpt_path=tmp_path / "cut.ckpt")
    rows = ledger(tmp_path / "first")
    tokens = [sum(r["response_tokens"] for r in rows if r["batch"] == b) for b in range(3)]
    assert 0 < second < tokens[1]
    assert third == pytest.approx(tokens[2], rel=1e-5)
