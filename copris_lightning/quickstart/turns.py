"""Runs of ``copris fit`` that take turns: what slows the machine down then slows them alike.

Each run is a process of its own with :class:`TakesTurns` among its callbacks, and trains only
between the keeper's word and the end of its turn. Its engine is idle meanwhile, as it is during
training in the staged flows.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L

from copris_lightning.core.batching import MicroBatch
from copris_lightning.trainer_parts import datamodule


@dataclass(frozen=True)
class Moment:
    """Where a run is.

    Attributes:
        batch: batches trained.
        seconds: in its turns, validation left out.
        tokens: response tokens trained on.
        reward: mean of the batch, or of an evaluation's held-out prompts.
        held_out: whether it is the latter.
    """

    batch: int
    seconds: float
    tokens: int
    reward: float
    held_out: bool = False


class TakesTurns(L.Callback):
    """Trains while it is this run's turn. List it last, after WeightSync.

    Args:
        descriptor: of the connection to the keeper, inherited from it.
        batches: how long a turn is.
    """

    def __init__(self, descriptor: int, batches: int) -> None:
        self.batches = batches
        self._descriptor = descriptor
        self._seconds = 0.0
        self._since = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The engine has booted: wait for the first turn."""
        self._keeper = Connection(self._descriptor)
        self._wait()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: MicroBatch,
        batch_idx: int,
    ) -> None:
        """Tell of a batch, and wait if the turn is over."""
        if not batch.is_last:
            return
        self._stop()
        self._tell(trainer, float(trainer.callback_metrics["train/reward"]))
        if trainer.global_step % self.batches == 0:
            self._wait()
        self._go()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock stands still."""
        self._stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell of the evaluations, all alike."""
        found = [
            float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/") and name.endswith("/avg_at_k")
        ]
        self._tell(trainer, sum(found) / len(found), held_out=True)
        self._go()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stay until all are done: an engine that ends is in the others' way."""
        self._wait()

    def _tell(self, trainer: L.Trainer, reward: float, *, held_out: bool = False) -> None:
        tokens = datamodule(trainer).feed.balance().delivered
        moment = Moment(trainer.global_step, self._seconds, tokens, reward, held_out)
        self._keeper.send(moment)

    def _wait(self) -> None:
        self._keeper.send(None)
        self._keeper.recv()
        self._go()

    def _go(self) -> None:
        self._since = time.perf_counter()

    def _stop(self) -> None:
        self._seconds += time.perf_counter() - self._since


def train_by_turns(
    commands: Mapping[str, Sequence[str]], folder: Path, *, batches: int, turns: int
) -> dict[str, list[Moment]]:
    """Run ``copris fit`` in several ways, each in a process, by turns.

    Args:
        commands: by name, a command line that trains ``turns`` times ``batches`` batches.
        folder: exists; gets each run's ``NAME.log``.
        batches: of a turn.
        turns: of each run; every other round goes in reverse.

    Returns:
        by name, what each told.

    Raises:
        RuntimeError: a run ended before its time; says where its log is.
    """
    runs = {name: _Run(name, command, folder, batches) for name, command in commands.items()}
    try:
        for run in runs.values():
            run.listen()
        for turn in range(turns):
            for run in list(runs.values())[:: -1 if turn % 2 else 1]:
                run.take_turn()
        for run in runs.values():
            run.leave()
    finally:
        for run in runs.values():
            run.end()
    return {name: run.moments for name, run in runs.items()}


class _Run:
    """One of the processes, as its keeper sees it."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, batches: int) -> None:
        self.name = name
        self.moments: list[Moment] = []
        self._log = folder / f"{name}.log"
        self._connection, theirs = Pipe()
        overlay = folder / f"{name}.yaml"
        overlay.write_text(
            "trainer:\n  callbacks+:\n"
            f"    - class_path: {TakesTurns.__module__}.{TakesTurns.__qualname__}\n"
            f"      init_args: {{descriptor: {theirs.fileno()}, batches: {batches}}}\n"
        )
        with self._log.open("w") as log, theirs:
            self._process = subprocess.Popen(
                [*command, "--config", str(overlay)],
                pass_fds=[theirs.fileno()],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def listen(self) -> None:
        """Keep what it tells until it waits."""
        try:
            while (moment := self._connection.recv()) is not None:
                self.moments.append(moment)
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"the run {self.name!r} ended: see {self._log}") from error

    def take_turn(self) -> None:
        """Let it train until it waits again."""
        self._connection.send(None)
        self.listen()

    def leave(self) -> None:
        """It has trained on all, and waits at the end."""
        self._connection.send(None)  # its last turn is over
        self.listen()
        self._connection.send(None)
        if self._process.wait():
            raise RuntimeError(f"the run {self.name!r} failed: see {self._log}")

    def end(self) -> None:
        """Whatever happened: no process is left."""
        self._connection.close()  # who waits for its turn ends with an error
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
