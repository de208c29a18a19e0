"""The LightningDataModule: prompts and an engine in, micro-batches of trajectories out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from copris_lightning.datamodules.checkpoint_file import check_resumed
from copris_lightning.datamodules.checks import (
    check_epochs,
    check_estimator,
    check_limits,
    check_optimizer,
    check_sync,
    write_before_sync,
)
from copris_lightning.datamodules.continuity import Continuity
from copris_lightning.datamodules.evaluation import evaluate, evaluation_batches
from copris_lightning.datamodules.feed import Feed
from copris_lightning.datamodules.loader import SizedStream
from copris_lightning.datamodules.preparation import Preparation, prepare
from copris_lightning.datamodules.protocols import RolloutListener, RunWriter
from copris_lightning.datamodules.ranks import Ranks
from copris_lightning.datamodules.sealed import Sealed
from copris_lightning.datamodules.settings import (
    BatchSize,
    Credit,
    Evaluation,
    Flow,
    RolloutSettings,
    Task,
)
from copris_lightning.engines.apart import placed
from copris_lightning.engines.engine import Engine
from copris_lightning.errors import under
from copris_lightning.rollout.rewards import RewardScorer
from copris_lightning.rollout.scheduler import Event
from copris_lightning.rollout.session import RolloutSession
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.runs.directory import directory_of
from copris_lightning.runs.resume import attach
from copris_lightning.trainer_parts import callbacks
from copris_lightning.weights.transport import Transport, Weights

T = TypeVar("T")


class RolloutDataModule(L.LightningDataModule):
    """Streams batches of scored trajectories from an engine kept full at a fixed concurrency.

    Args:
        model: path or hub name of the checkpoint that the engine boots with (linked to the
            module's by the command line).
        task: what is trained on: prompts, reward, sampling.
        engine: generates; :class:`VLLMEngine`, :class:`VLLMServerEngine` or
            :class:`SimulatedEngine`.
        flow: how rollouts and training take turns.
        batch: what a batch is made of.
        credit: from rewards to advantages.
        evaluations: prompts to evaluate on, by name. ``fit`` measures those of ``validate`` with
            the last synced weights, and logs ``val/<name>/avg_at_k`` and ``pass_at_k``.
        seed: of the prompt order and of sampling.

    Raises:
        ConfigurationError: a setting that cannot work; names it.
    """

    def __init__(
        self,
        model: str,
        task: Task,
        engine: Engine,
        flow: Flow = Flow(),  # noqa: B008 - frozen
        batch: BatchSize = BatchSize(),  # noqa: B008 - frozen
        credit: Credit = Credit(),  # noqa: B008 - frozen
        evaluations: dict[str, Evaluation] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.engine = engine
        self.settings = RolloutSettings(task, flow, batch, credit, dict(evaluations or {}), seed)
        self.observers: list[Callable[[Event], None]] = []
        """Called with every scheduler event of training, on the rollout thread."""
        self.session: RolloutSession | None = None
        """The engine's thread; on rank 0 only, from ``setup`` to ``teardown``."""
        self.feed: Feed | None = None
        """Micro-batches for training, in ``fit``."""
        self.has_begun = False
        """Whether ``fit`` is past restoring and starting, so that there is something to save."""
        self.transport: Transport | None = None
        """This rank's way of weights to the engine, from the first sync on."""
        self._ranks: Ranks | None = None
        self._prepared: Preparation | None = None
        self._last_state: dict[str, Any] = {}

    @property
    def trainer(self) -> Any:
        """The trainer of the running command, or ``None``."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        # Lightning sets this before it chooses a checkpoint and starts loggers.
        self._trainer = trainer
        if isinstance(trainer, L.Trainer):
            attach(trainer)

    # -- setting up and closing ------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check everything that can be known wrong, then boot the engine on rank 0."""
        assert self.trainer is not None
        self.has_begun = False
        self._prepared = run = prepare(self.settings, self.model, self.trainer, stage)
        if stage == "fit":
            self._check_training(run)
        check_sync(self.trainer)
        write_before_sync(self.trainer)
        directory_of(self.trainer)
        for callback in callbacks(self.trainer):
            if isinstance(callback, RunWriter):
                callback.open(self.trainer, stage)
        with under("engine"):
            self.engine.validate(run.spec)
        going_on = run.continuity() if stage == "fit" else None
        self._ranks = self._ranks or Ranks()
        self.ranks.lead(partial(self._open, run, going_on))
        self.feed = None
        if going_on is not None:
            going_on.warn()
            self.feed = Feed(
                self.trainer,
                self.session,
                going_on,
                ranks=self.ranks,
                observer=self._observe,
            )

    @property
    def ranks(self) -> Ranks:
        """All ranks, from ``setup`` on."""
        assert self._ranks is not None
        return self._ranks

    def _open(self, run: Preparation, going_on: Continuity | None) -> None:
        check_resumed(self.trainer, self, going_on)
        if self.session is None:
            scorer = RewardScorer(self.settings.task.scoring)
            self.session = RolloutSession(
                placed(self.engine, run.spec), run.spec, scorer, run.decoder(), self._while_waiting
            )

    def _check_training(self, run: Preparation) -> None:
        check_limits(self.trainer)
        check_optimizer(self.trainer)
        run.shape.check(self.settings.batch)
        check_estimator(self.trainer, self.settings.flow)
        check_epochs(self.trainer, run.shape, run.epoch)

    def teardown(self, stage: str) -> None:
        """Close the engine."""
        self.close()

    def on_exception(self, exception: BaseException) -> None:
        """Close the engine: Lightning does not call ``teardown`` after an exception."""
        self.close()

    def close(self) -> None:
        """End the rollout thread, the engine's processes and the reward's. May be called twice."""
        session, self.session = self.session, None
        transport, self.transport = self.transport, None
        if transport is not None:
            transport.close()
        if session is not None:
            try:
                # A checkpoint may still be asked for, as by `trainer.save_checkpoint` after `fit`.
                self._last_state = self.feed.state_dict() if self.feed is not None else {}
            finally:
                self.feed = None
                session.close()

    def update_weights(self, weights: Weights, version: int) -> None:
        """Give the engine new weights; tokens generated from now on bear ``version``.

        Args:
            weights: begins a pass over them; all ranks must call this with theirs.
            version: the policy version that they are.

        Raises:
            WeightSyncError: they did not arrive.
        """
        if self.transport is None:
            engine = self.engine if self.session is None else self.session.engine
            self.transport = engine.transport(self.ranks.rank, self._run)
        transport = self.transport

        def call(work: Callable[[SharedEngine], Coroutine[Any, Any, None]]) -> None:
            assert self.session is not None
            self.session.call(work(self.session.shared))

        self.ranks.lead(lambda: call(SharedEngine.hold))
        self.ranks.together(lambda: transport.send(weights))
        self.ranks.lead(lambda: call(lambda shared: shared.release(version)))

    def explain(self, weights: Weights) -> str:
        """Which of the weights the engine does not compute with; all ranks must ask, and rank 0 is
        answered."""
        transport = self.transport
        assert transport is not None
        return self.ranks.together(lambda: transport.explain(weights))

    def _run(self, work: Coroutine[Any, Any, T]) -> T | None:
        """On the rollout thread; nothing on ranks that have none."""
        if self.session is not None:
            return self.session.call(work)
        work.close()
        return None

    def probe_sequences(self, count: int) -> tuple[list[str], list[list[int]]]:
        """Token sequences to compare engine and trainer on: trained ones, or else prompts.

        Returns:
            the prompts' ids, and as many sequences of at least two tokens.
        """
        assert self._prepared is not None
        run = self._prepared
        names: list[str] = []
        sequences: list[list[int]] = []
        groups = self.feed.batch.groups if self.feed is not None else ()
        for trajectory in (group.trajectories[0] for group in groups[:count]):
            names.append(trajectory.prompt_id)
            sequences.append(trajectory.sequence[: run.probe_tokens].tolist())
        if not sequences:
            ends = run.stop_token_ids(self.settings.task.sampling)
            for queued in islice(run.prompts, count):
                names.append(queued.prompt.id)
                # A prompt of one token predicts nothing by itself.
                sequences.append([*queued.token_ids, *ends[:1]])
        return names, sequences

    # -- loaders ---------------------------------------------------------------------------

    def train_dataloader(self) -> SizedStream:
        """Micro-batches; asking for the first of a batch rolls it out."""
        if self.feed is None:  # DeepSpeed looks for a batch size here, whatever the command
            return SizedStream(0, lambda: iter(()))
        return SizedStream(len(self.feed), self._micro_batches)

    def _micro_batches(self) -> Iterator[Any]:
        assert self.feed is not None
        self.has_begun = True
        yield from self.feed

    def val_dataloader(self) -> list[SizedStream]:
        """Evaluated prompts of each evaluation on ``validate``; nothing if there are none."""
        return self._evaluations()

    def test_dataloader(self) -> list[SizedStream]:
        """Evaluated prompts of each evaluation on ``test``."""
        return self._evaluations()

    def predict_dataloader(self) -> list[SizedStream]:
        """Responses to the prompts of each evaluation on ``predict``."""
        return self._evaluations()

    def _evaluations(self) -> list[SizedStream]:
        run = self._prepared
        assert run is not None
        return [
            SizedStream(
                evaluation_batches(run, name),
                partial(lambda name: evaluate(self.session, run, name, self.ranks), name),
            )
            for name in run.evaluations
        ]

    def on_before_batch_transfer(self, batch: Sealed, dataloader_idx: int) -> Any:
        """The batch itself, for the device."""
        return batch.batch

    # -- while a rollout runs --------------------------------------------------------------

    def _observe(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)

    def _while_waiting(self) -> None:
        assert self.trainer is not None
        if self.trainer.received_sigterm:
            raise SIGTERMException
        if self.feed is not None and self.feed.meter.is_running:
            for callback in callbacks(self.trainer):
                if isinstance(callback, RolloutListener):
                    callback.on_rollout_progress(self.feed.progress())

    # -- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Buffer, prompt position and open batch: rank 0's, which is what Lightning saves.

        ZeRO-3 saves a file per rank. The others' must not be empty, or they would not be asked to
        load anything, while rank 0 waits for them.
        """
        if self.feed is None:
            return self._last_state
        return self.feed.state_dict() or {"rank": self.ranks.rank}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from rank 0's state in a checkpoint; evaluation has none."""
        if self.feed is not None and state_dict:
            self.feed.load_state_dict(state_dict)
