"""From the rollout to micro-batches: take, score, credit, divide, scatter; and where that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning as L

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.saved import SavedGroups
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.datamodules.checksums import with_checksums
from copris_lightning.datamodules.continuity import Continuity
from copris_lightning.datamodules.credit import quarantine, set_advantages
from copris_lightning.datamodules.cycle import Cycle
from copris_lightning.datamodules.divide import BatchShape, divide
from copris_lightning.datamodules.equal_rewards import EqualRewards
from copris_lightning.datamodules.figures import response_figures, stage_figures
from copris_lightning.datamodules.ranks import Ranks
from copris_lightning.datamodules.scoring import score_behavior, score_proximal
from copris_lightning.datamodules.stage_meter import RolloutProgress, StageMeter
from copris_lightning.datamodules.steps import epoch_micro_batches
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.figures import TokenBalance
from copris_lightning.rollout.filters import ZeroVarianceFilter
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.session import RolloutSession


@dataclass(frozen=True)
class Batch:
    """A batch from its take to its last micro-batch. There is no other state between the two.

    Attributes:
        index: from the run's first start on; -1 before the first batch.
        version: of the policy that is trained on it.
        groups: that were taken; none on other ranks than 0.
        figures: to log with it.
        micro_batches: this rank's, in the order of training; none before it is divided.
        packed: whether it is divided for passes without padding.
        first_step: optimizer steps of the run before its own.
        position: micro-batches handed out.
    """

    index: int = -1
    version: int = 0
    groups: tuple[PromptGroup, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)
    micro_batches: tuple[MicroBatch, ...] = ()
    packed: bool = False
    first_step: int = 0
    position: int = 0

    @property
    def rows(self) -> list[Trajectory]:
        """Its trajectories."""
        return [trajectory for group in self.groups for trajectory in group.trajectories]

    @property
    def is_open(self) -> bool:
        """Whether some of its micro-batches are still to be trained on."""
        return self.position < len(self.micro_batches)

    @property
    def is_undivided(self) -> bool:
        """Whether it was taken, and something interrupted what comes before training on it."""
        return bool(self.groups) and not self.micro_batches


class Feed:
    """Endless micro-batches for this rank.

    Args:
        trainer: its module recomputes log-probs; its accumulation shapes the batches.
        session: the engine, on rank 0; ``None`` elsewhere.
        run: what identifies the rollout: prompts, settings, shape of batches.
        ranks: all of them.
        observer: called with every scheduler event, on the rollout thread.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        session: RolloutSession | None,
        run: Continuity,
        *,
        ranks: Ranks,
        observer: Callable[[Event], None],
    ) -> None:
        self.batch = Batch()
        """The last one that was taken."""
        self.cycle = Cycle()
        """Where this rank's time goes; it runs from the first rollout on."""
        self.meter = StageMeter()
        self.scheduler: RolloutScheduler | None = None
        self._trainer = trainer
        self._session = session
        self._run = run
        self._ranks = ranks
        if session is not None:
            self._warn_of_equal_rewards = EqualRewards(
                session.reward_name, session.decode, run.prompts.prompt
            )
            self.scheduler = _scheduler(session, run, self.meter, observer)

    def __len__(self) -> int:
        """Micro-batches of an epoch: every prompt once, as far as full batches go."""
        return self.shape.epoch(len(self._run.prompts), self._run.settings.batch.groups)

    @property
    def epoch(self) -> int:
        """Micro-batches of an epoch of this run, limits included."""
        return epoch_micro_batches(self._trainer, len(self))

    @property
    def shape(self) -> BatchShape:
        """How batches are divided."""
        return self._run.shape

    @property
    def parts(self) -> list[int]:
        """How a batch is divided: ranks, updates, micro-batches."""
        return self._run.parts

    @property
    def trained_batches(self) -> int:
        """Batches of the run, from its first start on, that were trained on as a whole."""
        batch = self.batch
        return batch.index + 1 - (batch.is_open or batch.is_undivided)

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch that was handed out last is the last of its optimizer step."""
        return self.batch.position % self.shape.micro_batches == 0

    def __iter__(self) -> Iterator[MicroBatch]:
        """Go on where the feed is; it has no end of its own."""
        while True:
            self.cycle.watch.switch("idle")
            if not self.batch.is_open:
                self._next_batch()
            batch = self.batch
            self.batch = replace(batch, position=batch.position + 1)
            self.cycle.watch.switch("train")
            yield batch.micro_batches[batch.position]

    def progress(self) -> RolloutProgress:
        """Where the running stage is; may be asked from any thread, on rank 0."""
        assert self.scheduler is not None
        return self.meter.read(self.scheduler.buffer)

    def balance(self) -> TokenBalance | None:
        """Where all response tokens are, on rank 0."""
        if self._session is None or self.scheduler is None:
            return None
        return self._session.call(_balance(self.scheduler), watch=False)

    # -- one batch -------------------------------------------------------------------------

    def _next_batch(self) -> None:
        """Take, score, credit, divide, scatter: every rank takes part in scoring."""
        watch = self.cycle.watch
        with watch.during("rollout"):
            self._ranks.lead(self._take)
        waited_s = self._ranks.waited_s
        with watch.during("score"):
            self._score()
        watch.move(self._ranks.waited_s - waited_s, "score", "idle")
        self.batch = self._ranks.deal(self._credit_and_divide)

    def _take(self) -> None:
        """The groups of the next batch, unless they were taken before something interrupted."""
        assert self._session is not None
        assert self.scheduler is not None
        self._check_synced(self.scheduler.buffer.version)
        if not self.batch.is_undivided:
            self._session.call(self._taken(self.scheduler), watch=True)

    async def _taken(self, scheduler: RolloutScheduler) -> None:
        """Keep the groups before anything can interrupt: they have left the buffer."""
        with self.meter.running():
            groups, stats = await scheduler.take()
        self.batch = Batch(
            index=self.batch.index + 1,
            version=scheduler.buffer.version,
            groups=tuple(groups),
            figures=stage_figures(stats),
        )

    def _check_synced(self, version: int) -> None:
        """The trainer can only score tokens made with the weights that it has."""
        is_stale = self.batch.position > 0 and version == self.batch.version
        if is_stale and self._run.settings.flow.source == "trainer":
            raise ConfigurationError(
                "flow.behavior_logprobs=trainer needs a weight sync after every batch, and there "
                f"was none after batch {self.batch.index}; set it to engine, or sync"
            )

    def _score(self) -> None:
        """Log-probs that nobody can compute any more once the weights change."""
        settings = self._run.settings
        sampling, max_tokens = settings.task.sampling, settings.batch.score_tokens
        taken = everything = None
        if self.scheduler is not None:
            taken = self.batch.rows
            everything = [*taken, *self.scheduler.buffer.trajectories()]
        if settings.flow.source == "trainer":
            self.cycle.score([t for t in everything or () if t.missing("trainer")])
            score_behavior(
                self._trainer, everything, self._ranks, sampling=sampling, max_tokens=max_tokens
            )
        if self._needs_proximal:
            self.cycle.score(taken or ())
            score_proximal(
                self._trainer, taken, self._ranks, sampling=sampling, max_tokens=max_tokens
            )

    @property
    def _needs_proximal(self) -> bool:
        module: Any = self._trainer.lightning_module
        return bool(module.estimator.needs_proximal)

    def _credit_and_divide(self) -> list[Batch]:
        """On rank 0, each rank's batch; its own is kept at once, so that a checkpoint holds it even
        if a rank dies before all have theirs."""
        credit, sampling = self._run.settings.credit, self._run.settings.task.sampling
        batch = self.batch
        self._warn_of_equal_rewards(batch.groups)
        quarantine(batch.groups, credit.max_quarantined)
        set_advantages(batch.groups, credit, sampling)
        figures = {**batch.figures, **response_figures(batch.rows)}
        module: Any = self._trainer.lightning_module
        packed, step = module.policy.packs, self._trainer.global_step
        parts = self._divided(replace(batch, figures=figures, packed=packed, first_step=step))
        self.batch = parts[0]
        return parts

    def _divided(self, batch: Batch) -> list[Batch]:
        """A batch as each rank has it: only rank 0 has its groups."""
        settings = self._run.settings
        micro_batches = divide(
            batch.groups,
            replace(self.shape, packed=batch.packed),
            source=settings.flow.source,
            policy_version=batch.version,
            sampling=settings.task.sampling,
            quarantine_limit=settings.credit.quarantine_limit(settings.batch),
            metrics=batch.figures,
            seed=batch.index,
        )
        self.cycle.train([one for own in micro_batches for one in own[batch.position :]])
        parts = [replace(batch, groups=(), micro_batches=tuple(own)) for own in micro_batches]
        return [replace(parts[0], groups=batch.groups), *parts[1:]]

    # -- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rank 0's buffer, prompts and place in the batch, as plain values."""
        if self._session is None or self.scheduler is None:
            return {}
        batch = self.batch
        # Whole optimizer steps, not where the feed is: gradients accumulated so far are not saved.
        steps = self._trainer.global_step - batch.first_step
        position = min(steps * self.shape.micro_batches, len(batch.micro_batches))
        is_open = batch.is_undivided or position < len(batch.micro_batches)
        state = {
            **self._run.state_dict(),
            **self._session.call(self.scheduler.snapshot(), watch=False),
            "batch_index": batch.index,
            "delivered": SavedGroups.of(batch.groups if is_open else ()).state_dict(),
            "undivided": batch.is_undivided,
            "position": position if is_open else 0,
            "packed": batch.packed,
            "first_step": batch.first_step,
            "policy_version": batch.version,
            "metrics": batch.figures,
        }
        return with_checksums(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from rank 0's saved place; a batch that was being trained on is divided again."""

        def checked() -> dict[str, Any]:
            self._run.check(state, str(self._trainer.ckpt_path))
            prompts: dict[str, Any] = state["prompts"]
            return prompts

        self._run.prompts.load_state_dict(self._ranks.share(checked))
        self.batch = self._ranks.deal(partial(self._restored, state))

    def _restored(self, state: dict[str, Any]) -> list[Batch]:
        """On rank 0, each rank's batch: divided, if the checkpoint was taken within it."""
        assert self.scheduler is not None
        self.scheduler.buffer.load_state_dict(state["buffer"])
        self.scheduler.shared.places.restore(state["places"])
        if not self._run.asks_logprobs:
            for trajectory in self.scheduler.buffer.trajectories():
                trajectory.logprobs.pop("engine", None)  # its next tokens come without
        batch = Batch(
            index=state["batch_index"],
            version=state["policy_version"],
            groups=tuple(SavedGroups.from_state(state["delivered"]).groups()),
            figures=state["metrics"],
            packed=state["packed"],
            first_step=state["first_step"],
            position=state["position"],
        )
        if not batch.groups or state["undivided"]:
            return [batch, *[replace(batch, groups=())] * (self.shape.world_size - 1)]
        if self._needs_proximal and any(t.missing("proximal") for t in batch.rows):
            raise ConfigurationError(
                "the checkpoint was taken within a batch whose proximal log-probs were not "
                "computed; set estimator.ratio.proximal=loglinear for this "
                "batch, or resume from another checkpoint"
            )
        return self._divided(batch)


def _scheduler(
    session: RolloutSession,
    run: Continuity,
    meter: StageMeter,
    observer: Callable[[Event], None],
) -> RolloutScheduler:
    settings = run.settings
    accept = None
    if settings.credit.drop_zero_variance:
        limit = settings.credit.dropped_limit(settings.batch)
        accept = ZeroVarianceFilter(limit, session.reward_name)

    def observe(event: Event) -> None:
        meter.observe(event)
        observer(event)

    return session.new_scheduler(
        run.new_buffer(),
        run.prompts,
        decoding=run.decoding,
        seed=settings.seed,
        name="train",
        accept=accept,
        observer=observe,
    )


async def _balance(scheduler: RolloutScheduler) -> TokenBalance:
    return scheduler.figures.balance()
