"""Checkpoints at any moment of a step: what goes on from one is what the uncut run does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from simulated_fits import build, ledger
from torch import Tensor

from copris_lightning.callbacks.weight_sync import WeightSync
from copris_lightning.errors import ConfigurationError, EngineError

ACCUMULATE, UPDATES = 3, 2
PER_BATCH = ACCUMULATE * UPDATES
BATCHES = 2


class Recorder(L.Callback):
    """Every batch's logged figures, and the number loggers count by."""

    def __init__(self) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.logged: dict[int, int] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int):
        loop = trainer.fit_loop.epoch_loop
        self.logged[trainer.global_step] = loop._batches_that_stepped
        if batch.is_last:
            timings = ("time/", "sync/", "train/tokens_per_s")
            self.figures[trainer.datamodule.feed.batch.index] = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if not name.startswith(timings)
            }


class SaveEverywhere(L.Callback):
    """A checkpoint after every micro-batch, as by time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: list[Path] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.files.append(self.directory / f"{len(self.files):02d}.ckpt")
        trainer.save_checkpoint(self.files[-1])


def make(
    checkpoint: Path, directory: Path, callbacks: Sequence[L.Callback] = (), **options: Any
) -> tuple[L.Trainer, Any, Any, Recorder]:
    recorder = Recorder()
    settings = {
        "accumulate_grad_batches": ACCUMULATE,
        "gradient_clip_val": 0.02,
        "max_steps": BATCHES * UPDATES,
        **options,
    }
    data = {
        "updates": UPDATES,
        "cap": 16,
        "max_new_tokens": 16,
        **settings.pop("data", {}),
    }
    trainer, module, datamodule, _ = build(
        checkpoint, directory, callbacks=[recorder, *callbacks], data=data, **settings
    )
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)
    module.lr_scheduler = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)
    return trainer, module, datamodule, recorder


class Uncut:
    """A run from begin to end, and the checkpoints that were saved on its way."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        save = SaveEverywhere(directory)
        trainer, module, data, self.recorder = make(checkpoint, directory, [save])
        trainer.fit(module, data)
        self.weights = weights(module)
        self.ledger = ledger(directory)
        self.files = save.files
        self.optimizer = trainer.optimizers[0].state_dict()

    def assert_same(self, trainer: Any, module: Any, recorder: Recorder, directory: Path) -> None:
        assert trainer.global_step == BATCHES * UPDATES
        assert recorder.figures[BATCHES - 1] == self.recorder.figures[BATCHES - 1]
        for index, figures in recorder.figures.items():
            assert figures == self.recorder.figures[index]
        for step, logged in recorder.logged.items():
            assert logged == self.recorder.logged[step]
        ours = weights(module)
        assert all(torch.equal(ours[name], tensor) for name, tensor in self.weights.items())
        state = trainer.optimizers[0].state_dict()
        assert state["param_groups"] == self.optimizer["param_groups"]
        records = ledger(directory)
        first = records[0]["batch"]
        assert records == [r for r in self.ledger if r["batch"] >= first]


def weights(module: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.fixture(scope="module")
def uncut(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Uncut:
    return Uncut(tiny_checkpoint, tmp_path_factory.mktemp("uncut"))


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 4, 5, 6, 9, 10])
def test_a_checkpoint_after_any_micro_batch_goes_on_as_the_uncut_run(
    uncut: Uncut, tiny_checkpoint: Path, tmp_path: Path, cut: int
) -> None:
    trainer, module, data, recorder = make(tiny_checkpoint, tmp_path)
    trainer.fit(module, data, ckpt_path=uncut.files[cut], weights_only=True)
    uncut.assert_same(trainer, module, recorder, tmp_path)


class Broken(RuntimeError):
    """What happens in the middle of a run."""


class FailAt(L.Callback):
    """Fails in one of Lightning's hooks, at its n-th call."""

    def __init__(self, hook: str, call: int) -> None:
        self.calls = 0

        def fail(trainer: Any, *args: Any) -> None:
            self.calls += 1
            if self.calls == call:
                if hook == "on_train_batch_end":  # the signal: acted on after the batch
                    trainer._signal_connector.received_sigterm = True
                    return
                raise Broken

        setattr(self, hook, fail)


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("on_before_backward", 5),
        ("on_before_backward", PER_BATCH),
        ("on_after_backward", PER_BATCH + 1),
        ("on_train_batch_end", 2),
        ("on_train_batch_end", PER_BATCH),
        ("on_train_batch_start", 2),
    ],
)
def test_a_checkpoint_saved_on_an_exception_goes_on_as_the_uncut_run(
    uncut: Uncut, tiny_checkpoint: Path, tmp_path: Path, hook: str, call: int
) -> None:
    saver = OnExceptionCheckpoint(tmp_path)
    trainer, module, data, _ = make(
        tiny_checkpoint, tmp_path, [FailAt(hook, call), saver], enable_checkpointing=True
    )
    with pytest.raises((Broken, SIGTERMException)):
        trainer.fit(module, data)
    trainer, module, data, recorder = make(tiny_checkpoint, tmp_path)
    trainer.fit(module, data, ckpt_path=saver.ckpt_path, weights_only=True)
    uncut.assert_same(trainer, module, recorder, tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_whose_sync_failed_is_in_the_ledger_and_not_in_the_next_ones_figures(
    tiny_checkpoint: Path, tmp_path: Path, version: int
) -> None:
    steps = 3 * UPDATES
    trainer, module, data, whole = make(tiny_checkpoint, tmp_path / "whole", max_steps=steps)
    trainer.fit(module, data)
    saver = OnExceptionCheckpoint(tmp_path)
    trainer, module, data, _ = make(
        tiny_checkpoint, tmp_path, [saver], max_steps=steps, enable_checkpointing=True
    )
    release = data.engine.release

    async def fail(number: int, **options: Any) -> None:
        if number == version:
            raise EngineError("the engine died")
        await release(number, **options)

    data.engine.release = fail
    with pytest.raises(EngineError, match="the engine died"):
        trainer.fit(module, data)
    trainer, module, data, recorder = make(tiny_checkpoint, tmp_path, max_steps=steps)
    trainer.fit(module, data, ckpt_path=saver.ckpt_path)
    assert ledger(tmp_path) == ledger(tmp_path / "whole")
    assert recorder.figures == {i: whole.figures[i] for i in range(version, 3)}


class HalfStep(torch.optim.SGD):
    """Is interrupted when some weights are new and others are not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        closure()
        self.param_groups[0]["params"][0].add_(1.0)
        raise Broken


def test_weights_of_no_step_are_not_resumed_from(tiny_checkpoint: Path, tmp_path: Path) -> None:
    saver = OnExceptionCheckpoint(tmp_path)
    trainer, module, data, _ = make(tiny_checkpoint, tmp_path, [saver], enable_checkpointing=True)
    module.optimizer = lambda p: HalfStep(p, lr=0.5)
    with pytest.raises(Broken):
        trainer.fit(module, data)
    trainer, module, data, _ = make(tiny_checkpoint, tmp_path)
    with pytest.raises(ConfigurationError, match=r"on_exception\.ckpt.*interrupted.*earlier"):
        trainer.fit(module, data, ckpt_path=saver.ckpt_path)


def test_a_checkpoint_between_the_last_step_and_its_sync_names_its_weights_version(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    save = SaveEverywhere(tmp_path)
    trainer, module, data, _ = make(tiny_checkpoint, tmp_path, max_steps=UPDATES)
    trainer.callbacks.insert(0, save)  # before WeightSync
    trainer.fit(module, data)
    trainer, module, data, _ = make(tiny_checkpoint, tmp_path, max_steps=UPDATES + 1)
    trainer.fit(module, data, ckpt_path=save.files[PER_BATCH - 1])
    (sync,) = (c for c in trainer.callbacks if isinstance(c, WeightSync))
    assert sync.version == 1


class SkipTheRest(L.LightningModule):
    """What ends an epoch where no setting says so."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


def test_a_step_on_a_part_of_a_batch_is_refused_whatever_ended_the_epoch(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, module, data, _ = make(tiny_checkpoint, tmp_path)
    module.on_train_batch_start = SkipTheRest().on_train_batch_start
    with pytest.raises(ConfigurationError, match="step on a part of batch 0: something ended an"):
        trainer.fit(module, data)


class StopAfter(L.Callback):
    """Sets the trainer's flag in the middle of a step, as a time limit does."""

    def __init__(self, micro_batches: int) -> None:
        self.left = micro_batches

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        trainer.should_stop |= not self.left


@pytest.mark.parametrize("cut", [1, PER_BATCH - 1])
def test_a_run_that_is_told_to_stop_within_a_step_can_be_gone_on_from(
    uncut: Uncut, tiny_checkpoint: Path, tmp_path: Path, cut: int
) -> None:
    trainer, module, data, _ = make(tiny_checkpoint, tmp_path, [StopAfter(cut)])
    trainer.fit(module, data)
    assert trainer.global_step == cut // ACCUMULATE
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer, module, data, recorder = make(tiny_checkpoint, tmp_path)
    trainer.fit(module, data, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True)
    uncut.assert_same(trainer, module, recorder, tmp_path)


@pytest.mark.parametrize(("accumulate", "updates"), [(2, 1), (1, 4), (4, 2)])
def test_batches_may_be_divided_in_another_way_from_a_whole_one_on(
    uncut: Uncut, tiny_checkpoint: Path, tmp_path: Path, accumulate: int, updates: int
) -> None:
    trainer, module, data, recorder = make(
        tiny_checkpoint,
        tmp_path,
        data={"updates": updates},
        accumulate_grad_batches=accumulate,
        max_steps=UPDATES + 3 * updates,
    )
    trainer.fit(module, data, ckpt_path=uncut.files[PER_BATCH - 1])
    progress = trainer.fit_loop.epoch_loop.batch_progress
    assert progress.current.ready == 4 * accumulate * updates
    assert sorted(recorder.figures) == [1, 2, 3]
