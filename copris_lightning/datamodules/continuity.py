"""What a checkpoint and the run that goes on from it must have in common.

A run that goes on trains on what the uncut run would have, or refuses. So the prompts, their order
and their tokens must be the same; and while responses are unfinished, so must be whatever decides
how a token is drawn and scored. What may change: the cap, B, K, the division of whole batches, and
all that concerns evaluation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.saved import SavedGroups
from copris_lightning.datamodules.checksums import refuse_changed
from copris_lightning.datamodules.divide import BatchShape
from copris_lightning.datamodules.identity import DataIdentity
from copris_lightning.datamodules.prompts.stream import PromptStream
from copris_lightning.datamodules.settings import RolloutSettings
from copris_lightning.engines.engine import Decoding
from copris_lightning.errors import ConfigurationError

LAYOUT = 5
"""Of the rollout's state in a checkpoint; another one is refused."""


@dataclass(frozen=True)
class Continuity:
    """What identifies a run's rollout.

    Attributes:
        settings: the rollout's numbers.
        shape: how batches are divided.
        stop_token_ids: tokens that end a response.
        prompts: the training prompts.
        identity: of these.
        asks_logprobs: whether the engine's log-probs are used, and so asked for.
    """

    settings: RolloutSettings
    shape: BatchShape
    stop_token_ids: tuple[int, ...]
    prompts: PromptStream
    identity: DataIdentity
    asks_logprobs: bool

    @property
    def decoding(self) -> Decoding:
        """How the engine is asked for tokens."""
        return Decoding(self.settings.task.sampling, logprobs=self.asks_logprobs)

    def new_buffer(self) -> CarryOverBuffer:
        """An empty buffer for this run."""
        return CarryOverBuffer(
            limit=self.settings.flow.bounds.most,
            group_size=self.settings.batch.group_size,
            batch_groups=self.settings.batch.groups,
            max_new_tokens=self.settings.task.sampling.max_new_tokens,
            stop_token_ids=self.stop_token_ids,
            max_staleness=self.settings.flow.max_staleness,
        )

    @property
    def parts(self) -> list[int]:
        """How a batch is divided: ranks, updates, micro-batches."""
        return [self.shape.world_size, self.shape.updates, self.shape.micro_batches]

    def warn(self) -> None:
        """Say which values of the prompts could change without being noticed."""
        if self.identity.opaque:
            warnings.warn(
                f"task.prompts hold values of {', '.join(self.identity.opaque)}, which have no "
                "canonical form: a run that is resumed cannot tell whether they are the same",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "layout": LAYOUT,
            "parts": self.parts,
            "data": self.identity.state_dict(),
            "seed": self.settings.seed,
            "sampling": self._sampling,
            "behavior_logprobs": self.settings.flow.source,
            "reward": self.settings.task.scoring.name,
            "special_tokens": self.settings.task.template.special_tokens,
        }

    def check(self, state: dict[str, Any], name: str) -> None:
        """Refuse a rollout's state that this run would not go on from as the uncut run did.

        Args:
            state: of a checkpoint.
            name: the checkpoint's.

        Raises:
            ConfigurationError: names it, and the prompt or the setting that is not what it was.
        """
        try:
            self._check(state)
        except ConfigurationError as error:
            raise ConfigurationError(f"ckpt_path={name!r}: {error}") from error

    def _check(self, state: dict[str, Any]) -> None:
        if state.get("layout") != LAYOUT:
            raise ConfigurationError(
                f"the checkpoint's rollout has layout {state.get('layout', 1)}, and this version "
                f"reads layout {LAYOUT}: go on with the version of copris-lightning that saved it"
            )
        refuse_changed(state)
        self._check_prompts(state)
        self._check_unfinished(state)
        if state["position"] and state["parts"] != self.parts:
            raise ConfigurationError(
                f"the checkpoint was taken within a batch of {state['parts']} (ranks, updates, "
                f"micro-batches); this run divides it into {self.parts}: keep trainer.devices, "
                f"trainer.accumulate_grad_batches and batch.updates for this batch"
            )
        try:
            self.new_buffer().check(state["buffer"])
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    def _check_prompts(self, state: dict[str, Any]) -> None:
        difference = self.identity.difference(
            DataIdentity.from_state(state["data"]), iter(self.prompts)
        )
        if difference is not None:
            raise ConfigurationError(
                f"task.prompts are not those that the checkpoint was saved with: {difference}. "
                "Its place among them and its unfinished responses belong to those; give them "
                "again, in the same order, or start a new run (without ckpt_path)"
            )
        self._same("seed", state["seed"], self.settings.seed, "the order of the prompts")

    def _check_unfinished(self, state: dict[str, Any]) -> None:
        held = SavedGroups.from_state(state["buffer"]["groups"])
        delivered = SavedGroups.from_state(state["delivered"])
        begun = held.begun + delivered.begun
        if begun:
            what = f"{begun} responses that it holds"
            for name, value in self._sampling.items():
                self._same(f"task.sampling.{name}", state["sampling"].get(name), value, what)
        unscored = held.lacking("trainer") + delivered.lacking("trainer")
        was, now = state["behavior_logprobs"], self.settings.flow.source
        if unscored and was == "engine" and now == "trainer":
            self._same("flow.behavior_logprobs", was, now, "responses begun under older weights")
        unknown = held.lacking("engine") + delivered.lacking("engine")
        if unknown and self.asks_logprobs:
            flow = self.settings.flow
            user = "flow.behavior_logprobs" if now == "engine" else "estimator.corrections"
            user = "flow.kv=kept" if flow.keeps else user
            user = "flow.mode=streaming" if flow.streams else user
            raise ConfigurationError(
                f"{user} needs the engine's log-probs, and the checkpoint holds {unknown} "
                "responses for which they were not asked; keep what it was saved with, or start a "
                "new run (without ckpt_path)"
            )
        if held.scored:
            what = f"{held.scored} responses of its groups"
            task = self.settings.task
            self._same("task.scoring.reward", state["reward"], task.scoring.name, what)
            shown = state["special_tokens"]
            name = "task.template.special_tokens"
            self._same(name, shown, task.template.special_tokens, what)

    @property
    def _sampling(self) -> dict[str, Any]:
        """What decides how a token is drawn and when a response ends, by setting."""
        return {
            **self.settings.task.sampling.distribution,
            "stop_token_ids": list(self.stop_token_ids),
            "stop": list(self.settings.task.sampling.stop),
        }

    @staticmethod
    def _same(name: str, was: Any, now: Any, what: str) -> None:
        if was != now:
            by = " (the config's seed_everything)" if name == "seed" else ""
            raise ConfigurationError(
                f"{name}={now}{by} is not the checkpoint's {was}, which decided {what}; set "
                "it to that, or start a new run (without ckpt_path)"
            )
