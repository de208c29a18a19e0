"""A run that stops and waits at a wanted place, so that a test can end it exactly there.

The environment names the place (``COPRIS_TEST_PLACE``) and a file (``COPRIS_TEST_MARKER``). The run
makes the file when it is there, and goes on when the test has put a file ``.go`` beside it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

from copris_lightning import CoprisModule, VLLMEngine
from copris_lightning.quickstart.task import DivisionReward
from copris_lightning.rollout.rewards import Prompt

PLACES = ("boot", "sync", "stage", "reward", "scoring", "training")
"""In the order in which a run comes past them. The first three are in the engine's worker, the
fourth in a reward's process, the others in the trainer."""


def hold(place: str) -> None:
    """Wait for the test, if this is where it wants the run to be."""
    if os.environ.get("COPRIS_TEST_PLACE") != place:
        return
    marker = Path(os.environ["COPRIS_TEST_MARKER"])
    marker.touch()
    while not marker.with_suffix(".go").exists():
        time.sleep(0.02)


class HoldingEngine(VLLMEngine):
    """Holds in its worker: in the boot, in the second sync, or in a stage."""

    worker_extension: ClassVar[str] = "holding_worker.HoldingExtension"


class HoldingReward(DivisionReward):
    """Holds within a call of the reward."""

    def __call__(self, response: str, prompt: Prompt) -> float:
        hold("reward")
        return super().__call__(response, prompt)


class HoldingModule(CoprisModule):
    """Holds in the trainer: when it recomputes a batch's log-probs, or trains on it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        feed = self.trainer.datamodule.feed
        if feed is not None and feed.batch.is_undivided:  # a batch has been taken, not yet scored
            hold("scoring")
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        hold("training")
        return super().training_step(*args, **kwargs)
