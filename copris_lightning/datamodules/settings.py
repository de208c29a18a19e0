"""What a rollout is set to: small objects that travel whole and are checked where they are made.

Errors name a setting as the object has it; whoever holds the object names that as well. What
depends on the trainer is checked in ``checks.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from copris_lightning.core.cap import Cap
from copris_lightning.core.estimator.advantage import grpo
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import LogprobSource
from copris_lightning.datamodules.prompts.stream import PromptSource
from copris_lightning.datamodules.prompts.template import Template
from copris_lightning.errors import ConfigurationError, under
from copris_lightning.rollout.rewards import Scoring

Advantage = Callable[[Tensor], Tensor]
"""Rewards ``[groups, G]`` to advantages of that shape; see ``core.estimator.advantage``."""

Command = Literal["validate", "test", "predict"]

_LEAST_TRAJECTORY_BYTES = 2**10
"""What a trajectory without a token takes, about."""


@dataclass(frozen=True)
class Task:
    """What is trained on.

    Attributes:
        prompts: the training prompts.
        scoring: the reward.
        sampling: how responses are drawn.
        template: how conversations become prompts, and responses text.
        max_prompt_tokens: longest prompt, also in evaluations.
        skip_long_prompts: leave longer prompts out instead of refusing them.
    """

    prompts: PromptSource
    scoring: Scoring
    sampling: Sampling = field(default_factory=Sampling)
    template: Template = field(default_factory=Template)
    max_prompt_tokens: int = 256
    skip_long_prompts: bool = False

    def __post_init__(self) -> None:
        _at_least(1, max_prompt_tokens=self.max_prompt_tokens)
        with under("sampling"):
            self.sampling.check_training()


@dataclass(frozen=True)
class Flow:
    """How rollouts and training take turns.

    Attributes:
        mode: ``staged`` (the paper's) holds the engine while a batch is trained on; ``streaming``
            generates meanwhile, and new weights come in flight.
        kv: what a sync does to trajectories in flight: ``fresh`` (the paper's) computes their keys
            and values again with the new weights; ``kept`` goes on with those that there are.
        cap: trajectories in flight, N': a number; bounds ``{least: 16, most: 256}`` between which
            it follows how full the engine's KV cache is; or ``auto``, which is these.
        max_staleness: largest lag of a trained token in policy versions; ``null`` for no bound,
            0 for synchronous RL without carry-over. In streaming it also is what keeps the engine
            from running ahead of the trainer.
        behavior_logprobs: ``trainer`` (the paper's) recomputes each segment's log-probs under the
            weights that made it; ``engine`` takes those that it sampled with; ``auto`` is the
            trainer's where it can compute them, in ``staged`` with ``fresh``.
    """

    mode: Literal["staged", "streaming"] = "staged"
    kv: Literal["fresh", "kept"] = "fresh"
    cap: int | Literal["auto"] | Cap = 64
    max_staleness: int | None = None
    behavior_logprobs: Literal["auto"] | LogprobSource = "auto"

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, ("staged", "streaming"))
        _one_of("kv", self.kv, ("fresh", "kept"))
        if isinstance(self.cap, str):
            _one_of("cap", self.cap, ("auto",))
        elif not isinstance(self.cap, Cap):
            _at_least(1, cap=self.cap)
        if self.max_staleness is not None:
            _at_least(0, max_staleness=self.max_staleness)
        _one_of("behavior_logprobs", self.behavior_logprobs, ("auto", "trainer", "engine"))
        name = "cap.most" if isinstance(self.cap, Cap) else "cap"
        _check_memory(f"{name}={self.bounds.most}", self.bounds.most)
        if self.streams and self.max_staleness is None:
            raise ConfigurationError(
                "mode=streaming needs max_staleness, a bound on how far generation runs ahead of "
                "training; set it to 1 or 2"
            )
        if self.behavior_logprobs == "trainer" and (self.streams or self.keeps):
            why = "keys and values of older weights" if self.keeps else "weights that are gone"
            setting = "kv=kept" if self.keeps else "mode=streaming"
            raise ConfigurationError(
                f"behavior_logprobs=trainer with {setting}: tokens are made with {why}, and "
                "the trainer cannot compute their log-probs; set it to auto or engine"
            )

    @property
    def bounds(self) -> Cap:
        """Of the trajectories in flight."""
        if isinstance(self.cap, int):
            return Cap(self.cap, self.cap)
        return self.cap if isinstance(self.cap, Cap) else Cap()

    @property
    def streams(self) -> bool:
        """Whether the engine generates while the trainer trains."""
        return self.mode == "streaming"

    @property
    def keeps(self) -> bool:
        """Whether keys and values outlive a sync."""
        return self.kv == "kept"

    @property
    def source(self) -> LogprobSource:
        """Whose log-probs are the behaviour's."""
        if self.behavior_logprobs != "auto":
            return self.behavior_logprobs
        return "engine" if self.streams or self.keeps else "trainer"


@dataclass(frozen=True)
class BatchSize:
    """What a batch is made of, and how it is gone through.

    Attributes:
        groups: prompts per batch, B.
        group_size: trajectories per prompt, G >= 2.
        updates: optimizer steps on each batch.
        score_tokens: tokens per forward pass when log-probs are recomputed, padding included.
    """

    groups: int = 16
    group_size: int = 8
    updates: int = 1
    score_tokens: int = 16384

    def __post_init__(self) -> None:
        _at_least(1, groups=self.groups, updates=self.updates, score_tokens=self.score_tokens)
        if self.group_size < 2:
            raise ConfigurationError(
                f"group_size={self.group_size} must be at least 2: advantages compare a "
                "trajectory with others of the same prompt"
            )
        if self.updates > self.groups:
            raise ConfigurationError(
                f"updates={self.updates} exceeds groups={self.groups}: an update needs a group"
            )
        name = f"groups={self.groups} x group_size={self.group_size}"
        _check_memory(name, self.groups * self.group_size)


@dataclass(frozen=True)
class Credit:
    """From rewards to advantages: what counts, and how much.

    Attributes:
        advantage: rewards ``[groups, G]`` to advantages; a function by its import path, such as
            those of :mod:`copris_lightning.core.estimator.advantage`.
        truncated: what becomes of responses that hit the limit: ``train`` on them like on any
            other, with the reward that they got; or ``mask`` them from the loss (their rewards
            still count for their group).
        overlong_cushion: DAPO's soft penalty for long responses grows from 0 to -1 over this share
            of the limit below it; 0 for none.
        drop_zero_variance: drop groups of equal rewards and roll out others (DAPO).
        max_dropped_groups: groups in a row that may be dropped before the run ends with an error;
            by default ten batches' worth.
        max_quarantined: share of a batch's trajectories that may be left out because a reward or
            log-prob is not finite, before the run ends with an error.
    """

    advantage: Advantage = grpo
    truncated: Literal["train", "mask"] = "train"
    overlong_cushion: float = 0.0
    drop_zero_variance: bool = False
    max_dropped_groups: int | None = None
    max_quarantined: float = 0.25

    def __post_init__(self) -> None:
        _one_of("truncated", self.truncated, ("train", "mask"))
        if self.max_dropped_groups is not None:
            _at_least(1, max_dropped_groups=self.max_dropped_groups)
        for name in ("overlong_cushion", "max_quarantined"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must lie between 0 and 1")

    def dropped_limit(self, batch: BatchSize) -> int:
        """Groups in a row that may be dropped."""
        given = self.max_dropped_groups
        return 10 * batch.groups if given is None else given

    def quarantine_limit(self, batch: BatchSize) -> int:
        """Trajectories of a batch that may be left out."""
        return int(self.max_quarantined * batch.groups * batch.group_size)


@dataclass(frozen=True)
class Evaluation:
    """Prompts of their own, sampled without training on them.

    Attributes:
        prompts: are gone through once, in their order.
        on: the command that it belongs to; ``fit`` runs those of ``validate``.
        samples: responses per prompt, k.
        sampling: how they are drawn; by default as in training.
        pass_threshold: a sample passes with at least this reward. One without a verdict counts 0.
    """

    prompts: PromptSource
    on: Command = "validate"
    samples: int = 1
    sampling: Sampling | None = None
    pass_threshold: float = 1.0

    def __post_init__(self) -> None:
        _one_of("on", self.on, ("validate", "test", "predict"))
        _at_least(1, samples=self.samples)
        if not abs(self.pass_threshold) < float("inf"):
            raise ConfigurationError(
                f"pass_threshold={self.pass_threshold} must be a finite number"
            )
        if self.sampling is not None and self.sampling.is_greedy and self.samples > 1:
            raise ConfigurationError(
                f"samples={self.samples} with sampling.{_greedy(self.sampling)}: greedy decoding "
                "gives the same response every time; set samples=1, or draw samples"
            )


@dataclass(frozen=True)
class RolloutSettings:
    """All that decides what a rollout does, but for the model and the engine.

    Attributes are those of :class:`RolloutDataModule`.
    """

    task: Task
    flow: Flow = field(default_factory=Flow)
    batch: BatchSize = field(default_factory=BatchSize)
    credit: Credit = field(default_factory=Credit)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigurationError(f"seed={self.seed} must be from 0 to 2^32 - 1")
        for name, evaluation in self.evaluations.items():
            if not name or not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigurationError(
                    f"evaluations: {name!r} must be a name of letters, digits, - and _"
                )
            with under(f"evaluations.{name}"):
                trajectories = self.batch.groups * evaluation.samples
                _check_memory(f"samples={evaluation.samples}", trajectories)

    def sampling(self, evaluation: str | None = None) -> Sampling:
        """How responses are drawn, in training or in the evaluation of that name."""
        own = None if evaluation is None else self.evaluations[evaluation].sampling
        return own or self.task.sampling

    def samplings(self) -> dict[str, Sampling]:
        """Every sampling of the run, by the name of the setting."""
        found = {"task.sampling": self.task.sampling}
        for name, evaluation in self.evaluations.items():
            if evaluation.sampling is not None:
                found[f"evaluations.{name}.sampling"] = evaluation.sampling
        return found

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt plus response, in training or evaluation."""
        longest = max(sampling.max_new_tokens for sampling in self.samplings().values())
        return self.task.max_prompt_tokens + longest

    def check_model(self, context: int, vocabulary: int) -> None:
        """Refuse lengths and tokens that the model cannot take.

        Args:
            context: tokens that it can attend to.
            vocabulary: tokens that it can generate.

        Raises:
            ConfigurationError: names the setting.
        """
        limit = self.task.max_prompt_tokens
        lengths = {"task.max_prompt_tokens": limit}
        for name, sampling in self.samplings().items():
            with under(name):
                sampling.check_vocabulary(vocabulary)
            lengths[f"{name}.max_new_tokens"] = sampling.max_new_tokens
        for name, value in lengths.items():
            if value >= context:
                raise ConfigurationError(
                    f"{name}={value} does not fit the model's context of {context} tokens"
                )
        for name, value in list(lengths.items())[1:]:
            if limit + value > context:
                raise ConfigurationError(
                    f"task.max_prompt_tokens={limit} + {name}={value} = {limit + value} exceeds "
                    f"the model's context of {context} tokens; lower one of them"
                )


def _greedy(sampling: Sampling) -> str:
    name, value = next(iter(sampling.distribution.items()))
    return f"{name}={value}"


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ConfigurationError(f"{name}={value} must be at least {least}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} must be {' or '.join(choices)}")


def _check_memory(name: str, trajectories: int) -> None:
    """Refuse numbers of trajectories that no memory holds: they are typing errors."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if trajectories * _LEAST_TRAJECTORY_BYTES > memory:
        raise ConfigurationError(
            f"{name}: {trajectories:,} trajectories do not fit this machine's "
            f"memory of {memory / 2**30:.0f} GiB; lower it"
        )
