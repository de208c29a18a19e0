"""The probe's tolerance: by hand, or by what engine and trainer differ by at the start."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from simulated_fits import LoggingEngine, build

from copris_lightning import WeightSync
from copris_lightning.callbacks.parity import Difference, ParityProbe, compare
from copris_lightning.errors import ConfigurationError, ParityError

Off = Callable[[int], float]
"""What a log-prob is off by after so many syncs."""


class ScoringEngine(LoggingEngine):
    """Has the trainer's own log-probs, a little off."""

    def __init__(self, log: list[str], module: Any, off: Off, dtype: str = "float32") -> None:
        super().__init__(log)
        self.module, self.off, self.dtype = module, off, dtype
        self.asked = 0

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        self.asked += 1
        syncs = sum(entry.startswith("sync") for entry in self.log)
        scores = []
        for tokens in sequences:
            with torch.no_grad():
                logits = self.module.policy.model(torch.tensor([tokens])).logits[0, :-1]
            values = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            scores.append([value + self.off(syncs) for value in values.tolist()])
        return scores


def rounding(size: float) -> Off:
    generator = random.Random(0)
    return lambda syncs: generator.gauss(0, size)


def fit(
    checkpoint: Path,
    directory: Path,
    off: Off,
    *,
    dtype: str = "float32",
    tolerance: Any = "auto",
    resumed: Path | None = None,
    steps: int = 3,
) -> tuple[L.Trainer, WeightSync, ScoringEngine]:
    trainer, module, data, log = build(checkpoint, directory, max_steps=steps)
    engine = data.engine = ScoringEngine(log, module, off, dtype)
    (index,) = (i for i, c in enumerate(trainer.callbacks) if isinstance(c, WeightSync))
    sync = trainer.callbacks[index] = WeightSync(parity_tolerance=tolerance)
    trainer.fit(module, datamodule=data, ckpt_path=resumed)
    return trainer, sync, engine


def test_an_engine_of_another_precision_needs_no_number(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    trainer, sync, engine = fit(tiny_checkpoint, tmp_path, rounding(0.02), dtype="bfloat16")
    assert sync.version == 3
    assert engine.asked == 5  # before the first sync, and after each of four
    assert sync.parity.floor is not None
    assert 0.03 < sync.parity.floor.largest < 0.1
    assert sync.parity.floor.mean < 0.0126  # 0.1 / 8
    assert 0.01 < trainer.callback_metrics["sync/parity_mean_abs"] < 0.025
    with pytest.raises(ConfigurationError, match=r"engine_args\.dtype=bfloat16 is not"):
        fit(tiny_checkpoint, tmp_path / "by-hand", rounding(0.02), dtype="bfloat16", tolerance=1e-4)


def test_an_engine_that_goes_astray_later_is_stopped(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def astray(syncs: int) -> float:
        return 0.001 if syncs == 3 else 0.0

    with pytest.raises(ParityError, match=r"sync of version 2 .*0\.001 on average.*=auto allows 0"):
        fit(tiny_checkpoint, tmp_path, astray)
    # All of a bf16 engine's log-probs off by four times its rounding.
    noise = rounding(0.005)
    with pytest.raises(ParityError, match=r"sync of version 2 "):
        fit(
            tiny_checkpoint,
            tmp_path / "bf16",
            lambda syncs: noise(syncs) + (0.08 if syncs == 3 else 0.0),
            dtype="bfloat16",
        )


def test_a_sync_that_spoils_what_was_right_at_boot_is_stopped(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match="sync of version 0 "):
        fit(tiny_checkpoint, tmp_path, lambda syncs: 0.03 if syncs else 0.0)


@pytest.mark.parametrize(("dtype", "off"), [("float32", 0.006), ("bfloat16", 0.2)])
def test_what_can_be_no_rounding_is_no_floor(
    tiny_checkpoint: Path, tmp_path: Path, dtype: str, off: float
) -> None:
    with pytest.raises(ParityError, match="sync of version 0 "):
        fit(tiny_checkpoint, tmp_path, lambda syncs: off, dtype=dtype)


def test_weights_that_the_engine_did_not_boot_with_leave_the_floor_that_the_sync_finds(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    _, sync, _ = fit(tiny_checkpoint, tmp_path, lambda syncs: 1e-6 if syncs else 3.0)
    assert sync.parity.floor is not None
    assert sync.parity.floor.largest < 1e-5


def test_the_floor_is_in_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    trainer, sync, _ = fit(tiny_checkpoint, tmp_path, rounding(0.01), dtype="bfloat16")
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    # The engine boots with the original weights; what it differs by says nothing.
    off = rounding(0.01)
    _, resumed, engine = fit(
        tiny_checkpoint,
        tmp_path / "resumed",
        lambda syncs: off(syncs) if syncs else 3.0,
        dtype="bfloat16",
        resumed=tmp_path / "run.ckpt",
        steps=5,
    )
    assert resumed.parity.floor == Difference(
        sync.parity.floor.largest,
        sync.parity.floor.mean,  # type: ignore[union-attr]  # a fit has set it
    )
    assert engine.asked == 3


def test_differences_count_every_token_and_say_where_the_worst_is() -> None:
    ours = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -1.0, -4.0]])
    found = compare(["a", "b"], [[5, 6, 7], [5, 8, 9, 4]], ours, [[-1.0, -2.25], [-1.0, -1.0, -3]])
    assert (found.largest, found.mean) == (1.0, 0.25)
    assert found.where.startswith("token 3 (id 4) of prompt 'b': engine -3.0")
    lost = compare(["a"], [[5, 6, 7]], ours[:1], [[float("nan"), -2.0]])
    assert lost.largest == float("inf")
    assert lost.exceeds(ParityProbe(1e9, 1).limits)
