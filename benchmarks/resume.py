"""How long a run takes to go on, and how long it stands still to be saved, by how much it carries.

    python benchmarks/resume.py

A run on the simulated engine is ended after its first batch, with ever more trajectories carried
over. Measured is the time from the call of ``fit`` to the start of training, by turns with a run
that begins anew; and what the checkpoint takes. On a real engine its boot comes on top, and the
prefill of the carried prefixes: ``rollout.py`` says what is computed again.

While the buffer's state is taken, the rollout's event loop does nothing else. That time is measured
by turns with a copy of as many bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
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
from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.saved import SavedGroups
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
    return SavedGroups.from_state(data.state_dict()["buffer"]["groups"]).response_tokens


def seconds(model: str, cap: int, tokens: int, file: Path | None) -> float:
    """From the call of ``fit`` to the start of training."""
    module, data = parts(model, cap, tokens)
    stop = Stop()
    run = trainer(stop)
    started = time.perf_counter()
    with suppress(Begun):
        run.fit(module, data, ckpt_path=file)
    return stop.at - started


def holding(tokens: int, length: int) -> CarryOverBuffer:
    """A buffer in which so many tokens are in flight, with two log-probs each.

    Args:
        tokens: of all responses.
        length: of each response.
    """
    count = max(1, tokens // length)
    buffer = CarryOverBuffer(
        limit=count, group_size=GROUP_SIZE, batch_groups=1, max_new_tokens=2 * length
    )
    ids, logprobs = [7] * length, [-1.0] * length
    while buffer.in_flight < count:
        trajectory = buffer.next()
        if trajectory is None:
            buffer.admit(f"p{buffer.admitted}", 0, range(32))
            continue
        trajectory.append(ids, logprobs, 0)
        trajectory.add_logprobs("trainer", logprobs)
    return buffer


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of a state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for item in state.values() if isinstance(state, dict) else state:
            yield from tensors(item)


def standing_still(tokens: int, length: int, rounds: int) -> Table:
    """What the loop does not do while it is saved, in seconds."""
    buffer = holding(tokens, length)
    copied = list(tensors(buffer.state_dict()))
    size = sum(tensor.nbytes for tensor in copied)

    def copy() -> float:
        started = time.perf_counter()
        kept = [tensor.clone() for tensor in copied]
        took = time.perf_counter() - started
        assert len(kept) == len(copied)
        return took

    def save() -> float:
        started = time.perf_counter()
        state = buffer.state_dict()
        took = time.perf_counter() - started
        assert state["admitted"] == buffer.admitted
        return took

    title = (
        f"save: {tokens:,} tokens in {buffer.in_flight:,} trajectories, {size / 1e6:.1f} MB: "
        "seconds that the loop stands still"
    )
    times = by_turns({"copy": copy, "save": save}, rounds, warm_up=1)
    return Table(title, times, ("copy",), higher_is_better=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=5)
    line.add_argument("--caps", type=int, nargs="+", default=[64, 512, 4096])
    line.add_argument("--tokens", type=int, default=400, help="median length of a response")
    line.add_argument("--held", type=int, nargs="+", default=[2_000_000, 20_000_000])
    line.add_argument("--length", type=int, default=2000, help="of a response that is held")
    quick = {"caps": [16], "tokens": 16, "held": [4000], "length": 100}
    options = parse(line, arguments, quick)
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
    for held in options.held:
        report.add(standing_still(held, options.length, options.rounds))
    report.write()


if __name__ == "__main__":
    main()
