"""The training stream: collect, score, divide, hand out; and where it is, for checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.datamodules.continuity import Continuity
from copris_lightning.datamodules.credit import (
    Advantage,
    mean_reward,
    quarantine,
    set_advantages,
)
from copris_lightning.datamodules.divide import BatchShape, divide
from copris_lightning.datamodules.equal_rewards import EqualRewards
from copris_lightning.datamodules.ranks import Exchange
from copris_lightning.datamodules.scoring import score_behavior, score_proximal
from copris_lightning.datamodules.settings import KEY
from copris_lightning.datamodules.steps import epoch_micro_batches
from copris_lightning.engines.engine import Decoding
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.figures import StageStats
from copris_lightning.rollout.filters import ZeroVarianceFilter
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.session import RolloutSession


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """Where the running stage is.

    Attributes:
        ready_groups: complete groups so far.
        batch_groups: how many end the stage.
        in_flight: trajectories in flight.
        cap: how many there may be.
        tokens: response tokens received in this stage.
        seconds: since the stage began, on the engine's clock.
    """

    ready_groups: int
    batch_groups: int
    in_flight: int
    cap: int
    tokens: int
    seconds: float


class TrainingStream:
    """Endless micro-batches for this rank.

    Args:
        trainer: its module recomputes log-probs; its accumulation shapes the batches.
        session: the engine, on rank 0; ``None`` elsewhere.
        run: what identifies the rollout: prompts, settings, shape of batches.
        advantage: rewards to advantages.
        exchange: between ranks.
        observer: called with every scheduler event, on the rollout thread.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        session: RolloutSession | None,
        run: Continuity,
        *,
        advantage: Advantage,
        exchange: Exchange,
        observer: Callable[[Event], None],
    ) -> None:
        self.delivered: list[PromptGroup] = []
        self.batch_index = -1
        self._trainer = trainer
        self._session = session
        self._run = run
        self._prompts = run.prompts
        self._settings = settings = run.settings
        self._shape = run.shape
        self._advantage = advantage
        self._exchange = exchange
        self._observer = observer
        self._micro_batches: list[MicroBatch] = []
        self._position = 0
        self._first_step = 0
        self._undivided = False
        self._trained = False
        self.is_collecting = False
        self._stats = StageStats(0.0, 0, 0, 0, 0, 0, 0.0)
        self._metrics: dict[str, float] = {}
        self._policy_version = 0
        self._cycle_start: float | None = None
        self._stage_start = 0.0
        self._stage_tokens = 0
        self._stage_now = 0.0
        self.scheduler: RolloutScheduler | None = None
        if session is not None:
            self._equal_rewards = EqualRewards(
                session.reward_name, session.decode, run.prompts.prompt
            )
            self.scheduler = session.new_scheduler(
                run.new_buffer(),
                run.prompts,
                decoding=Decoding(temperature=settings.temperature),
                seed=settings.seed,
                name="train",
                accept=ZeroVarianceFilter(settings.dropped_limit, session.reward_name)
                if settings.drop_zero_variance
                else None,
                observer=self._observe,
            )

    def __len__(self) -> int:
        """Micro-batches of an epoch: every prompt once, as far as full batches go."""
        return self._shape.epoch(len(self._prompts), self._settings.batch_groups)

    @property
    def epoch(self) -> int:
        """Micro-batches of an epoch of this run, limits included."""
        return epoch_micro_batches(self._trainer, len(self))

    def __iter__(self) -> Iterator[MicroBatch]:
        """Go on where the stream is; it has no end of its own."""
        while True:
            if not self.has_open_batch:
                self._micro_batches = self._exchange.scatter(self._next_batch())
            self._position += 1
            self._trained = True
            yield self._micro_batches[self._position - 1]

    def gather(self, part: Any) -> list[Any]:
        """Every rank's ``part`` on rank 0, an empty list elsewhere; all ranks must call it."""
        return self._exchange.gather(part) or []

    @property
    def has_open_batch(self) -> bool:
        """Whether some micro-batches of the last batch are still to be trained on."""
        return self._position < len(self._micro_batches)

    @property
    def trained_batches(self) -> int:
        """Batches of the run, from its first start on, that were trained on as a whole."""
        return self.batch_index + 1 - self.has_open_batch

    @property
    def shape(self) -> BatchShape:
        """How batches are divided."""
        return self._shape

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch that was handed out last is the last of its optimizer step."""
        return self._position % self._shape.micro_batches == 0

    @property
    def _stepped(self) -> int:
        """Micro-batches of the last batch whose optimizer step was taken."""
        steps = self._trainer.global_step - self._first_step
        return min(steps * self._shape.micro_batches, len(self._micro_batches))

    def progress(self) -> RolloutProgress:
        """Where the running stage is; may be asked from any thread."""
        assert self.scheduler is not None
        buffer = self.scheduler.buffer
        return RolloutProgress(
            ready_groups=min(buffer.ready_groups, buffer.batch_groups),
            batch_groups=buffer.batch_groups,
            in_flight=buffer.in_flight,
            cap=buffer.cap,
            tokens=self._stage_tokens,
            seconds=self._stage_now - self._stage_start,
        )

    def _observe(self, event: Event) -> None:
        if event.kind == "chunk":
            self._stage_tokens += event.tokens
        self._stage_now = event.time
        self._observer(event)

    def _next_batch(self) -> list[list[MicroBatch]] | None:
        """Collect a batch on rank 0; every rank takes part in scoring it."""
        started = time.perf_counter()
        trajectories = None
        with self._exchange.leading():
            if self._session is not None and self.scheduler is not None:
                self._check_synced()
                if not self._undivided:
                    self._session.call(self._collect(self.scheduler), watch=True)
                trajectories = [t for group in self.delivered for t in group.trajectories]
                trajectories.extend(self.scheduler.buffer.trajectories())
        rolled_out = time.perf_counter()
        if self._settings.behavior_logprobs == "trainer":
            score_behavior(
                self._trainer,
                trajectories,
                self._exchange,
                temperature=self._settings.temperature,
                max_tokens=self._settings.score_batch_tokens,
            )
        if self._needs_proximal:
            delivered = [t for group in self.delivered for t in group.trajectories]
            score_proximal(
                self._trainer,
                None if trajectories is None else delivered,
                self._exchange,
                temperature=self._settings.temperature,
                max_tokens=self._settings.score_batch_tokens,
            )
        divided = None
        with self._exchange.leading():
            if trajectories is not None:
                self._equal_rewards(self.delivered)
                quarantine(self.delivered, self._settings.max_quarantined)
                set_advantages(self.delivered, self._advantage, self._settings)
            self.batch_index += 1
            self._position, self._first_step = 0, self._trainer.global_step
            if trajectories is not None:
                self._metrics = self._figures(started, rolled_out)
                divided = self._divide()
                self._micro_batches = divided[0]  # what a checkpoint holds if a rank dies now
        self._undivided = False
        return divided

    async def _collect(self, scheduler: RolloutScheduler) -> None:
        """Keep the batch before anything can interrupt: it has left the buffer."""
        self._stage_tokens, self._stage_start = 0, self._stage_now
        self.is_collecting = True
        try:
            self.delivered, self._stats = await scheduler.take()
        finally:
            self.is_collecting = False
        self._micro_batches, self._position = [], 0
        self._undivided = True
        self._policy_version = scheduler.buffer.version
        self._trained = False

    @property
    def _needs_proximal(self) -> bool:
        module: Any = self._trainer.lightning_module
        return bool(module.estimator.needs_proximal)

    def _check_synced(self) -> None:
        """The trainer can only score tokens made with the weights that it has."""
        assert self.scheduler is not None
        is_stale = self._trained and self.scheduler.buffer.version == self._policy_version
        if is_stale and self._settings.behavior_logprobs == "trainer":
            raise ConfigurationError(
                f"{KEY}.behavior_logprobs=trainer needs a weight sync after every batch, and there "
                f"was none after batch {self.batch_index}; set it to engine, or sync"
            )

    def _divide(self) -> list[list[MicroBatch]]:
        return divide(
            self.delivered,
            self._shape,
            source=self._settings.behavior_logprobs,
            policy_version=self._policy_version,
            temperature=self._settings.temperature,
            max_new_tokens=self._settings.max_new_tokens,
            quarantine_limit=int(
                self._settings.max_quarantined
                * self._settings.batch_groups
                * self._settings.group_size
            ),
            metrics=self._metrics,
            seed=self.batch_index,
        )

    def _figures(self, started: float, ended: float) -> dict[str, float]:
        stats = self._stats
        rows = [t for group in self.delivered for t in group.trajectories]
        tokens = sum(t.response_length for t in rows)
        figures = {
            "train/reward": mean_reward(rows),
            "train/response_tokens": tokens / len(rows),
            "train/truncated_fraction": sum(t.finish_reason == "length" for t in rows) / len(rows),
            "train/excluded_fraction": sum(t.excluded is not None for t in rows) / len(rows),
            "train/quarantined": float(sum(t.is_quarantined for t in rows)),
            "rollout/stage_s": stats.seconds,
            "rollout/tokens_per_s": stats.tokens / max(stats.seconds, 1e-9),
            "rollout/in_flight": stats.in_flight_mean,
            "rollout/carried_over": float(stats.carried_over),
            "rollout/ready_groups": float(stats.ready_groups),
            "rollout/dropped_groups": float(stats.dropped_groups),
            "rollout/resent_tokens": float(stats.resent_tokens),
            "rollout/dropped_tokens": float(stats.dropped_tokens),
        }
        if self._cycle_start is not None:
            # A cycle runs from one rollout's end to the next one's: training, sync, rollout.
            cycle = ended - self._cycle_start
            figures["time/cycle_s"] = cycle
            figures["time/rollout_fraction"] = (ended - started) / cycle
            figures["train/tokens_per_s"] = tokens / cycle
        self._cycle_start = ended
        return figures

    @property
    def parts(self) -> list[int]:
        """How a batch is divided: ranks, updates, micro-batches."""
        return self._run.parts

    # -- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rank 0's buffer, prompts and place in the batch, as plain values."""
        if self._session is None or self.scheduler is None:
            return {}
        # Not where the stream is: gradients accumulated so far are not saved.
        position = self._stepped
        is_open = self._undivided or position < len(self._micro_batches)
        return {
            **self._run.state_dict(),
            "buffer": self._session.call(_snapshot(self.scheduler.buffer), watch=False),
            "prompts": self._prompts.state_dict(),
            "batch_index": self.batch_index,
            "delivered": [g.state_dict() for g in self.delivered if is_open],
            "undivided": self._undivided,
            "position": position if is_open else 0,
            "first_step": self._first_step,
            "policy_version": self._policy_version,
            "metrics": self._metrics,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; a batch that was being trained on is divided again."""
        self._run.check(state)
        self.batch_index = state["batch_index"]
        self._position = state["position"]
        self._first_step = state["first_step"]
        self._policy_version = state["policy_version"]
        self._metrics = state["metrics"]
        self._undivided = state["undivided"]
        self.delivered = [PromptGroup.from_state(group) for group in state["delivered"]]
        self._prompts.load_state_dict(state["prompts"])
        parts = None
        with self._exchange.leading():
            if self.scheduler is not None:
                parts = self._restored_parts(self.scheduler, state["buffer"])
        self._micro_batches = self._exchange.scatter(parts)

    def _restored_parts(
        self, scheduler: RolloutScheduler, buffer: dict[str, Any]
    ) -> list[list[MicroBatch]]:
        """Each rank's micro-batches of the batch that the checkpoint was taken in; none if it was
        taken between two."""
        scheduler.buffer.load_state_dict(buffer)
        if not self.delivered or self._undivided:
            return [[] for _ in range(self._shape.world_size)]
        rows = [t for group in self.delivered for t in group.trajectories]
        if self._needs_proximal and not any(t.proximal_logprobs for t in rows):
            raise ConfigurationError(
                "the checkpoint was taken within a batch whose proximal log-probs were not "
                "computed; set model.init_args.ratio.init_args.proximal=loglinear for this "
                "batch, or resume from another checkpoint"
            )
        return self._divide()


async def _snapshot(buffer: CarryOverBuffer) -> dict[str, Any]:
    """Taken on the rollout thread, where rewards may still be coming in."""
    return buffer.state_dict()
