"""Carries batches past what would round them on their way from a loader to a step."""

from __future__ import annotations

from typing import Any


class Sealed:
    """A batch that Lightning's precision plugins look upon as one thing, and leave alone.

    DeepSpeed's makes bf16 of every float in a batch under ``bf16-mixed``, advantages and rewards
    among them, and log-probs of which each would be off by up to 0.4 %. The data module opens it
    before the batch goes to the device.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch
