"""Checks of the rollout's settings: everything that can be known wrong before an engine boots."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from copris_lightning.core.trajectory import LogprobSource
from copris_lightning.datamodules.sampling import Evaluation, Sampling
from copris_lightning.errors import ConfigurationError

KEY = "data.init_args"

_LEAST_TRAJECTORY_BYTES = 2**10
"""What a trajectory without a token takes, about."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """The numbers of a rollout; see :class:`RolloutDataModule` for their meaning."""

    cap: int
    batch_groups: int
    group_size: int
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    behavior_logprobs: LogprobSource
    max_staleness: int | None
    updates_per_batch: int
    score_batch_tokens: int
    val_samples: int
    val_temperature: float
    truncated: Literal["train", "mask"]
    overlong_cushion: float
    drop_zero_variance: bool
    max_dropped_groups: int | None
    max_quarantined: float
    seed: int
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        at_least: Sequence[tuple[str, int, int]] = (
            ("cap", self.cap, 1),
            ("batch_groups", self.batch_groups, 1),
            ("max_prompt_tokens", self.max_prompt_tokens, 1),
            ("max_new_tokens", self.max_new_tokens, 1),
            ("max_staleness", 0 if self.max_staleness is None else self.max_staleness, 0),
            ("updates_per_batch", self.updates_per_batch, 1),
            ("score_batch_tokens", self.score_batch_tokens, 1),
            ("val_samples", self.val_samples, 1),
            ("max_dropped_groups", self.dropped_limit, 1),
        )
        for name, value, least in at_least:
            if value < least:
                raise ConfigurationError(f"{KEY}.{name}={value} must be at least {least}")
        if self.group_size < 2:
            raise ConfigurationError(
                f"{KEY}.group_size={self.group_size} must be at least 2: advantages compare a "
                "trajectory with others of the same prompt"
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigurationError(
                f"{KEY}.temperature={self.temperature} must be above 0 and finite: log-probs are "
                "those of the distribution sampled from, which greedy decoding has not"
            )
        if not 0 <= self.val_temperature < math.inf:
            raise ConfigurationError(
                f"{KEY}.val_temperature={self.val_temperature} must be at least 0 (greedy) and "
                "finite"
            )
        if self.val_temperature == 0 and self.val_samples > 1:
            raise ConfigurationError(
                f"{KEY}.val_samples={self.val_samples} with val_temperature=0: greedy decoding "
                "gives the same response every time; set val_samples=1, or val_temperature above 0"
            )
        if self.behavior_logprobs not in ("trainer", "engine"):
            raise ConfigurationError(
                f"{KEY}.behavior_logprobs={self.behavior_logprobs!r} must be trainer or engine"
            )
        if self.truncated not in ("train", "mask"):
            raise ConfigurationError(f"{KEY}.truncated={self.truncated!r} must be train or mask")
        for name, share in (
            ("overlong_cushion", self.overlong_cushion),
            ("max_quarantined", self.max_quarantined),
        ):
            if not 0 <= share <= 1:
                raise ConfigurationError(f"{KEY}.{name}={share} must lie between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"{KEY}.seed={self.seed} must be from 0 to 2^32 - 1")
        self._check_memory()
        if self.updates_per_batch > self.batch_groups:
            raise ConfigurationError(
                f"{KEY}.updates_per_batch={self.updates_per_batch} exceeds "
                f"batch_groups={self.batch_groups}: an update needs a group"
            )

    def _check_memory(self) -> None:
        """Refuse numbers of trajectories that no memory holds: they are typing errors."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        batch = f"batch_groups={self.batch_groups} x {KEY}"
        for name, trajectories in (
            (f"cap={self.cap}", self.cap),
            (f"{batch}.group_size={self.group_size}", self.batch_groups * self.group_size),
            (f"{batch}.val_samples={self.val_samples}", self.batch_groups * self.val_samples),
        ):
            if trajectories * _LEAST_TRAJECTORY_BYTES > memory:
                raise ConfigurationError(
                    f"{KEY}.{name}: {trajectories:,} trajectories do not fit this machine's "
                    f"memory of {memory / 2**30:.0f} GiB; lower it"
                )

    @property
    def dropped_limit(self) -> int:
        """Groups in a row that may be dropped: ten batches' worth unless it is set."""
        given = self.max_dropped_groups
        return 10 * self.batch_groups if given is None else given

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus response, in training or evaluation."""
        return self.max_prompt_tokens + max(self.max_new_tokens, self.evaluation_tokens)

    @property
    def evaluation_tokens(self) -> int:
        """Longest response in evaluation."""
        return self.evaluation.max_new_tokens or self.max_new_tokens

    def check_context(self, context: int) -> None:
        """Refuse lengths that the model cannot take.

        Raises:
            ConfigurationError: names the length to lower.
        """
        for name, value in (
            ("max_prompt_tokens", self.max_prompt_tokens),
            ("max_new_tokens", self.max_new_tokens),
            ("evaluation.max_new_tokens", self.evaluation_tokens),
        ):
            if value >= context:
                raise ConfigurationError(
                    f"{KEY}.{name}={value} does not fit the model's context of {context} tokens"
                )
        if self.max_sequence_tokens > context:
            longer = self.evaluation_tokens > self.max_new_tokens
            name = "evaluation.max_new_tokens" if longer else "max_new_tokens"
            raise ConfigurationError(
                f"{KEY}.max_prompt_tokens={self.max_prompt_tokens} + "
                f"{name}={max(self.max_new_tokens, self.evaluation_tokens)} = "
                f"{self.max_sequence_tokens} exceeds the "
                f"model's context of {context} tokens; lower one of them"
            )
