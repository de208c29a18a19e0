"""Whether the engine computes the trainer's log-probs, judged by how well the two can agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.datamodules.rollout import RolloutDataModule
from copris_lightning.errors import ConfigurationError, ParityError
from copris_lightning.policy.randomness import (
    first_random_module,
    largest_difference,
    training_mode,
)
from copris_lightning.policy.sharding import score
from copris_lightning.weights.transport import Weights

Tolerance = float | Literal["auto"] | None

_FLOOR_SEQUENCES = 16
"""Sequences that the floor is measured on, at least."""

_LEAST = (1e-3, 1e-5)
"""No largest and no mean difference below these, in nats, is held against a sync: single tokens
that are improbable at the end of a long response were seen to differ by 2e-4 in fp32. The mean is
what tells."""

_FACTOR = (32.0, 8.0)
"""How far the largest and the mean difference may rise above the floor. Both grow with the size of
the logits, by a factor of 15 in the quickstart's training; the largest also with the tokens
looked at, which are many more after a stage than in the prompts that the floor is measured on."""

_PLAUSIBLE = {True: (5e-3, 1e-3), False: (float("inf"), 0.1)}
"""More than this is allowed by no floor, by whether both compute in fp32."""


@dataclass(frozen=True)
class Difference:
    """Between the engine's log-probs of some tokens and the trainer's.

    Attributes:
        largest: of a token, in nats; infinite where one is not a number.
        mean: over tokens, of absolute differences.
        where: the token of the largest.
    """

    largest: float
    mean: float
    where: str = ""

    def exceeds(self, limits: tuple[float, float]) -> bool:
        """Whether either figure is above its limit."""
        return self.largest > limits[0] or self.mean > limits[1]


class ParityProbe:
    """Compares log-probs after each sync.

    ``auto`` measures a floor once: at a fresh start the engine holds the checkpoint that the
    trainer holds, so that what they differ by before any sync is what they always differ by. If
    they hold different weights (a resumed run without a floor, a module that was trained before),
    the first sync changes that, and the floor is what is left.

    Args:
        tolerance: largest difference of a token's log-prob, in nats; ``auto``, by the floor.
        sequences: compared each time.
    """

    def __init__(self, tolerance: Tolerance, sequences: int) -> None:
        self.tolerance = tolerance
        self.sequences = sequences
        self.floor: Difference | None = None
        self.worst = 0.0
        self._before: Difference | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The largest and the mean difference that are let pass."""
        if self.tolerance == "auto":
            assert self.floor is not None
            figures = (self.floor.largest, self.floor.mean)
            return (
                max(_LEAST[0], _FACTOR[0] * figures[0]),
                max(_LEAST[1], _FACTOR[1] * figures[1]),
            )
        assert isinstance(self.tolerance, float | int)
        return self.tolerance, float("inf")

    def before_sync(self, trainer: L.Trainer, data: RolloutDataModule) -> None:
        """Measure how far engine and trainer are apart, if the floor is not known yet."""
        self._before = None
        if self.tolerance == "auto" and self.floor is None:
            self._before = self._measure(trainer, data, _FLOOR_SEQUENCES)

    def after_sync(
        self, trainer: L.Trainer, data: RolloutDataModule, weights: Weights, version: int
    ) -> Difference | None:
        """Compare; all ranks take part in the forward pass.

        Returns:
            the difference; ``None`` without a probe, or from an engine that has no model.

        Raises:
            ParityError: it is too large.
        """
        if self.tolerance is None:
            return None
        found = self._measure(trainer, data, _FLOOR_SEQUENCES if self._before else 0)
        if found is None:
            return None
        self.worst = max(self.worst, found.largest)
        if self.tolerance == "auto" and self.floor is None:
            self.floor = self._new_floor(trainer, data, found)
        if found.exceeds(self.limits):
            self._fail(data, weights, version, found)
        return found

    def _new_floor(
        self, trainer: L.Trainer, data: RolloutDataModule, after: Difference
    ) -> Difference:
        """The better of before and after the first sync, and no more than noise can be."""
        before = self._before or after
        theirs = getattr(data.engine, "dtype", None)
        precision = getattr(trainer.lightning_module, "precision", None)
        ours = getattr(precision, "dtype", None)
        is_exact = (
            theirs == ours == "float32"
            and str(trainer.precision) == "32-true"
            and torch.get_float32_matmul_precision() == "highest"
        )
        cap = _PLAUSIBLE[is_exact]
        return Difference(
            min(before.largest, after.largest, cap[0] / _FACTOR[0]),
            min(before.mean, after.mean, cap[1] / _FACTOR[1]),
        )

    def _fail(
        self, data: RolloutDataModule, weights: Weights, version: int, found: Difference
    ) -> None:
        cause = data.explain(weights)

        def fail() -> None:
            raise ParityError(
                f"after the sync of version {version} the engine's log-probs differ from the "
                f"trainer's by up to {found.largest:.3g} nats, {found.mean:.3g} on average; "
                f"{self._allowed}. The worst is at {found.where}. {cause}"
            )

        data.ranks.lead(fail)

    @property
    def _allowed(self) -> str:
        if self.tolerance != "auto":
            return f"the tolerance is WeightSync.parity_tolerance={self.tolerance}"
        largest, mean = self.limits
        return (
            f"WeightSync.parity_tolerance=auto allows {largest:.3g} and {mean:.3g}, by how far "
            "they differed at the start"
        )

    def _measure(
        self, trainer: L.Trainer, data: RolloutDataModule, at_least: int
    ) -> Difference | None:
        names, sequences, batch = _probe(data, max(self.sequences, at_least))

        def ask() -> list[list[float]] | None:
            assert data.session is not None
            return data.session.call(data.session.engine.score(sequences))

        scores = data.ranks.lead(ask)
        if not data.ranks.share(lambda: scores is not None):
            return None
        ours = score(trainer, batch)
        return data.ranks.share(lambda: compare(names, sequences, ours, scores or []))


def compare(
    names: Sequence[str],
    sequences: Sequence[Sequence[int]],
    ours: Tensor,
    theirs: Sequence[Sequence[float]],
) -> Difference:
    """The trainer's log-probs ``[B, R]`` and the engine's, of all tokens after the first."""
    worst, where, total, count = 0.0, "", 0.0, 0
    for name, sequence, row, values in zip(names, sequences, ours, theirs, strict=True):
        difference = (row[: len(values)] - torch.tensor(values)).abs()
        # A value that is not a number is the worst of all.
        difference = torch.where(difference.isnan(), torch.inf, difference)
        total, count = total + float(difference.sum()), count + len(values)
        position = int(difference.argmax())
        if float(difference[position]) >= worst:
            worst = float(difference[position])
            where = (
                f"token {position + 1} (id {sequence[position + 1]}) of prompt {name!r}: "
                f"engine {values[position]:.6f}, trainer {float(row[position]):.6f}"
            )
    return Difference(worst, total / max(1, count), where)


def check_repeatable(trainer: L.Trainer, data: RolloutDataModule, module: Any) -> None:
    """Ask the policy twice, as it is while training: random numbers would be noise in each ratio.

    Raises:
        ConfigurationError: it gave two answers.
    """
    names, _, batch = _probe(data, 2)
    model = module.policy.model
    with training_mode(module):
        first, second = (score(trainer, batch) for _ in range(2))
        precision = torch.float32 if str(trainer.precision) == "32-true" else torch.bfloat16
        dtype = max((model.dtype, precision), key=lambda d: torch.finfo(d).eps)
        # Kernels may add up in another order: a part of the square root of the rounding.
        found = largest_difference(first, second)
        if not data.ranks.share(lambda: found > torch.finfo(dtype).eps ** 0.5 / 2):
            return
        culprit = first_random_module(model, lambda: score(trainer, batch))
    raise ConfigurationError(
        f"model={module.model!r} draws random numbers in training mode: asked "
        f"twice about prompt {names[0]!r} and others, its log-probs differ by up to {found:.3g} "
        f"nats, from {culprit} on. The engine draws none, so that no importance ratio would mean "
        "anything; set its rates of dropout or noise to 0 in the checkpoint's config.json"
    )


def _probe(data: RolloutDataModule, count: int) -> tuple[list[str], list[list[int]], MicroBatch]:
    """Prompts' names, token sequences, and the same as a batch, on every rank."""
    names, sequences = data.ranks.share(lambda: data.probe_sequences(count))
    return names, sequences, _as_batch(sequences)


def _as_batch(sequences: Sequence[Sequence[int]]) -> MicroBatch:
    """Whole sequences as responses to their first token, under the model's own distribution."""
    rows = []
    for i, tokens in enumerate(sequences):
        rows.append(Trajectory(0, i, "probe", (tokens[0],), len(tokens)))
        rows[-1].observe(tokens[1:])
    return collate(rows, source=None)
