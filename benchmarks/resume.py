"""How long a run takes to go on, by how much it carries.

    python benchmarks/resume.py

A run on the simulated engine is ended after its first batch, with ever more trajectories carried
over. Measured is the time from the call of ``fit`` to the start of training, by turns with a run
that begins anew; and what the checkpoint takes. On a real engine its boot comes on top, and the
prefill of the carried prefixes: ``rollout.py`` says what is computed again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from harness import Report, Table, by_turns, parse, parser
from models import quiet, qwen3, save
from reward import reward

from copris_lightning import (
    BatchSize,
    CoprisModule,
    Flow,
    RolloutDataModule,
    Sampling,
    Scoring,
    SimulatedEngine,
    Task,
    WeightSync,
)
from copris_lightning.engines.simulated_tokens import LengthModel
from copris_lightning.rollout.rewards import Prompt

GROUP_SIZE = 8


class Numbers:
    """A prompt per number."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> Prompt:
        return Prompt(f"p{index}", text=str(index))


class Begun(Exception):
    """Training starts."""


class Stop(L.Callback):
    """Ends a run where training starts, and notes when that was."""

    at = 0.0

    def on_train_start(self, *args: Any) -> None:
        self.at = time.perf_counter()
        raise Begun


def parts(model: str, cap: int, tokens: int) -> tuple[CoprisModule, RolloutDataModule]:
    """What is trained, and on what."""
    task = Task(
        Numbers(2 * cap),
        Scoring(reward),
        Sampling(max_new_tokens=4 * tokens),
        max_prompt_tokens=32,
    )
    engine = SimulatedEngine(LengthModel(median=tokens, sigma=1.0), stream_interval=8)
    batch = BatchSize(groups=1, group_size=GROUP_SIZE)
    flow = Flow(cap=cap, behavior_logprobs="engine")
    return CoprisModule(model), RolloutDataModule(model, task, engine, flow, batch)


def trainer(*callbacks: L.Callback) -> L.Trainer:
    """One that trains on one batch, quietly."""
    return L.Trainer(
        accelerator="cpu",
        callbacks=[WeightSync(), *callbacks],
        max_steps=2 if callbacks else 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def carried(model: str, cap: int, tokens: int, file: Path) -> int:
    """Save a run after its first batch. Returns how many response tokens it carries over."""
    module, data = parts(model, cap, tokens)
    run = trainer()
    run.fit(module, data)
    run.save_checkpoint(file)
    groups = data.state_dict()["buffer"]["groups"]
    return sum(len(row["tokens"]) for group in groups for row in group["trajectories"])


def seconds(model: str, cap: int, tokens: int, file: Path | None) -> float:
    """From the call of ``fit`` to the start of training."""
    module, data = parts(model, cap, tokens)
    stop = Stop()
    run = trainer(stop)
    started = time.perf_counter()
    with suppress(Begun):
        run.fit(module, data, ckpt_path=file)
    return stop.at - started


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--caps", type=int, nargs="+", default=[64, 512, 4096])
    line.add_argument("--tokens", type=int, default=400, help="median length of a response")
    options = parse(line, arguments, {"caps": [16], "tokens": 16})
    quiet()
    report = Report("resume", options)
    with tempfile.TemporaryDirectory() as folder:
        context = 32 + 4 * options.tokens
        made = qwen3(64, 1, vocab=98, context=context, head_dim=32)
        model = save(made, Path(folder, "model"))
        for cap in options.caps:
            file = Path(folder, f"{cap}.ckpt")
            tokens = carried(model, cap, options.tokens, file)
            variants = {
                "anew": partial(seconds, model, cap, options.tokens, None),
                "resumed": partial(seconds, model, cap, options.tokens, file),
            }
            times = by_turns(variants, options.rounds, warm_up=1)
            size = file.stat().st_size / 1e6
            title = f"{cap:,} in flight, {tokens:,} tokens carried, {size:.1f} MB: seconds"
            report.add(Table(title, times, ("anew",), higher_is_better=False))
    report.write()


if __name__ == "__main__":
    main()
