"""From a batch of complete groups to each rank's micro-batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.estimator.normalization import UpdateTotals
from copris_lightning.core.packing import balance
from copris_lightning.core.partition import forward_cost, partition
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import LogprobSource, PromptGroup, Trajectory
from copris_lightning.datamodules.settings import BatchSize
from copris_lightning.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How a batch is divided.

    Attributes:
        world_size: ranks.
        updates: optimizer steps on the batch.
        micro_batches: per rank and optimizer step (``accumulate_grad_batches``).
        hidden_size: of the model, for the cost of long sequences.
        packed: whether micro-batches are computed on without padding.
    """

    world_size: int
    updates: int
    micro_batches: int
    hidden_size: int
    packed: bool = False

    @property
    def per_batch(self) -> int:
        """Micro-batches of a batch, per rank."""
        return self.updates * self.micro_batches

    def epoch(self, prompts: int, groups: int) -> int:
        """Micro-batches of an epoch: every prompt once, as far as full batches go.

        Args:
            prompts: how many there are.
            groups: prompts per batch.
        """
        return max(1, prompts // groups) * self.per_batch

    def parts(self, lengths: Sequence[int]) -> list[list[int]]:
        """An update's sequences, dealt to the micro-batches of all ranks, dearest first."""
        parts, cost = self.world_size * self.micro_batches, forward_cost(self.hidden_size)
        if self.packed:
            return balance([cost(n) for n in lengths], parts)
        return partition(lengths, parts, cost)

    def check(self, batch: BatchSize) -> None:
        """Refuse a shape that would leave a micro-batch empty.

        Args:
            batch: of which updates get whole groups.

        Raises:
            ConfigurationError: too few trajectories in an update, or no micro-batch.
        """
        if self.micro_batches < 1:
            raise ConfigurationError(
                f"trainer.accumulate_grad_batches={self.micro_batches} must be at least 1"
            )
        trajectories = (batch.groups // self.updates) * batch.group_size
        parts = self.world_size * self.micro_batches
        if trajectories < parts:
            raise ConfigurationError(
                f"an update of {trajectories} trajectories cannot fill {parts} micro-batches "
                f"({self.world_size} ranks x trainer.accumulate_grad_batches="
                f"{self.micro_batches}); lower accumulate_grad_batches or "
                f"batch.updates={self.updates}, or raise batch.groups={batch.groups}"
            )


def divide(
    groups: Sequence[PromptGroup],
    shape: BatchShape,
    *,
    source: LogprobSource,
    policy_version: int,
    sampling: Sampling,
    quarantine_limit: int = 0,
    metrics: dict[str, float],
    seed: int,
) -> list[list[MicroBatch]]:
    """Each rank's micro-batches, in the order of training; a pure function of its arguments.

    Groups are dealt at random to the updates. Trajectories that are excluded from the loss are
    left out, except where a micro-batch would be empty without them. Within an update,
    micro-batches of near-equal cost go to the ranks side by side, so that no rank waits long for
    another.
    """
    dealt = list(groups)
    if shape.updates > 1:
        random.Random(seed).shuffle(dealt)
    ranks: list[list[MicroBatch]] = [[] for _ in range(shape.world_size)]
    for update in range(shape.updates):
        dealt_rows = [t for group in dealt[update :: shape.updates] for t in group.trajectories]
        rows = [t for t in dealt_rows if t.excluded is None]
        totals = UpdateTotals(
            len(rows), sum(t.written_tokens for t in rows), sampling.max_new_tokens
        )
        parts = shape.world_size * shape.micro_batches
        excluded = sorted((t for t in dealt_rows if t.excluded is not None), key=sequence_length)
        rows += excluded[: max(0, parts - len(rows))]
        for i, indices in enumerate(shape.parts([sequence_length(t) for t in rows])):
            micro_batch = collate(
                [rows[j] for j in indices],
                source=source,
                policy_version=policy_version,
                sampling=sampling,
                totals=totals,
                quarantine_limit=quarantine_limit,
            )
            ranks[i % shape.world_size].append(micro_batch)
    for micro_batches in ranks:
        micro_batches[-1].is_last = True
        micro_batches[-1].metrics = metrics
    return ranks


def sequence_length(trajectory: Trajectory) -> int:
    """Prompt plus response, in tokens."""
    return len(trajectory.prompt) + trajectory.response_length
