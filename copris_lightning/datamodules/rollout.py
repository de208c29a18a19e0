"""The LightningDataModule: prompts and an engine in, micro-batches of trajectories out."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from typing import Any, Literal, TypeVar

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers import PreTrainedTokenizerBase

from copris_lightning.core.estimator.advantage import grpo
from copris_lightning.core.trajectory import LogprobSource
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
from copris_lightning.datamodules.credit import Advantage
from copris_lightning.datamodules.divide import BatchShape
from copris_lightning.datamodules.evaluation import evaluate, evaluation_batches
from copris_lightning.datamodules.feed import TrainingStream
from copris_lightning.datamodules.identity import DataIdentity
from copris_lightning.datamodules.loader import SizedStream
from copris_lightning.datamodules.prompts.inspection import usable_prompts
from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptSource, PromptStream
from copris_lightning.datamodules.prompts.template import Template
from copris_lightning.datamodules.protocols import RolloutListener, RunWriter
from copris_lightning.datamodules.ranks import Exchange
from copris_lightning.datamodules.sampling import Evaluation, Sampling
from copris_lightning.datamodules.sealed import Sealed
from copris_lightning.datamodules.settings import KEY, RolloutSettings
from copris_lightning.engines.engine import Engine, EngineSpec
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.pretrained import (
    context_length,
    load_config,
    load_tokenizer,
    stop_token_ids,
)
from copris_lightning.policy.pretrained_checks import check_pretrained
from copris_lightning.rollout.decoding import ResponseDecoder
from copris_lightning.rollout.rewards import Reward, RewardScorer
from copris_lightning.rollout.scheduler import Event
from copris_lightning.rollout.session import RolloutSession
from copris_lightning.runs.directory import directory_of
from copris_lightning.runs.resume import attach
from copris_lightning.trainer_parts import callbacks
from copris_lightning.weights.transport import Transport, Weights

T = TypeVar("T")

_STAGE_PROMPTS = {
    "fit": "prompts",
    "validate": "val_prompts",
    "test": "test_prompts",
    "predict": "predict_prompts",
}


class RolloutDataModule(L.LightningDataModule):
    """Streams batches of scored trajectories from an engine kept full at a fixed concurrency.

    Args:
        model: path or hub name of the checkpoint that the engine boots with (linked to the
            module's by the command line).
        prompts: the training prompts.
        reward: scores a response; see :class:`Reward`.
        engine: generates; :class:`VLLMEngine` or :class:`SimulatedEngine`.
        val_prompts: prompts of ``validate`` and of validation during ``fit``, which measures the
            last synced weights. A response without a verdict counts 0.
        test_prompts: prompts of ``test``.
        predict_prompts: prompts of ``predict``.
        cap: trajectories in flight, N'.
        batch_groups: prompts per batch, B.
        group_size: trajectories per prompt, G >= 2.
        max_prompt_tokens: longest prompt.
        skip_long_prompts: leave longer prompts out instead of refusing them.
        max_new_tokens: longest response, over all resumes.
        temperature: of the sampling distribution, > 0.
        behavior_logprobs: ``trainer`` (the paper's) recomputes each segment's log-probs under the
            weights that made it; ``engine`` takes those that it sampled with.
        max_staleness: largest lag of a trained token in policy versions; ``null`` for no bound,
            0 for synchronous RL without carry-over.
        updates_per_batch: optimizer steps on each batch.
        advantage: rewards ``[groups, G]`` to advantages; a function by its import path, such as
            those of :mod:`copris_lightning.core.estimator.advantage`.
        truncated: what becomes of responses that hit ``max_new_tokens``: ``train`` on them like on
            any other, with the reward that they got; or ``mask`` them from the loss (their
            rewards still count for their group).
        overlong_cushion: DAPO's soft penalty for long responses grows from 0 to -1 over this share
            of ``max_new_tokens`` below the limit; 0 for none.
        drop_zero_variance: drop groups of equal rewards and roll out others (DAPO).
        max_dropped_groups: groups in a row that may be dropped before the run ends with an error;
            by default ten batches' worth.
        max_quarantined: share of a batch's trajectories that may be left out because a reward or
            log-prob is not finite, before the run ends with an error.
        score_batch_tokens: padded tokens per forward pass when recomputing log-probs.
        val_samples: responses per prompt in evaluation, k.
        val_temperature: of the sampling distribution in evaluation; 0 is greedy decoding.
        sampling: tokens and strings that end a response besides the model's own end.
        evaluation: how sampling in evaluation differs otherwise.
        trust_remote_code: run code that the checkpoint brings along (linked to the module's by the
            command line).
        reward_timeout_s: limit on one call of the reward, in seconds from when a worker has it
            (real ones, also where the engine's clock is virtual).
        reward_workers: processes that compute rewards.
        seed: of the prompt order and of sampling.
        template: how conversations become prompts, and responses text; see :class:`Template`.

    Raises:
        ConfigurationError: a setting that cannot work; names the YAML key.
    """

    def __init__(
        self,
        model: str,
        prompts: PromptSource,
        reward: Reward,
        engine: Engine,
        val_prompts: PromptSource | None = None,
        test_prompts: PromptSource | None = None,
        predict_prompts: PromptSource | None = None,
        cap: int = 64,
        batch_groups: int = 16,
        group_size: int = 8,
        max_prompt_tokens: int = 256,
        skip_long_prompts: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        behavior_logprobs: LogprobSource = "trainer",
        max_staleness: int | None = None,
        updates_per_batch: int = 1,
        advantage: Advantage = grpo,
        truncated: Literal["train", "mask"] = "train",
        overlong_cushion: float = 0.0,
        drop_zero_variance: bool = False,
        max_dropped_groups: int | None = None,
        max_quarantined: float = 0.25,
        score_batch_tokens: int = 16384,
        val_samples: int = 1,
        val_temperature: float = 1.0,
        sampling: Sampling | None = None,
        evaluation: Evaluation | None = None,
        reward_timeout_s: float = 30.0,
        reward_workers: int = 1,
        seed: int = 0,
        template: Template | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.settings = RolloutSettings(
            cap=cap,
            batch_groups=batch_groups,
            group_size=group_size,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            behavior_logprobs=behavior_logprobs,
            max_staleness=max_staleness,
            updates_per_batch=updates_per_batch,
            score_batch_tokens=score_batch_tokens,
            val_samples=val_samples,
            val_temperature=val_temperature,
            truncated=truncated,
            overlong_cushion=overlong_cushion,
            drop_zero_variance=drop_zero_variance,
            max_dropped_groups=max_dropped_groups,
            max_quarantined=max_quarantined,
            seed=seed,
            sampling=sampling or Sampling(),
            evaluation=evaluation or Evaluation(),
        )
        self.model = model
        self.trust_remote_code = trust_remote_code
        self.engine = engine
        self.skip_long_prompts = skip_long_prompts
        self.advantage = advantage
        self.template = template or Template()
        self.sources: dict[str, PromptSource | None] = {
            "prompts": prompts,
            "val_prompts": val_prompts,
            "test_prompts": test_prompts,
            "predict_prompts": predict_prompts,
        }
        self.scorer = RewardScorer(reward, timeout_s=reward_timeout_s, workers=reward_workers)
        self.observers: list[Callable[[Event], None]] = []
        """Called with every scheduler event of training, on the rollout thread."""
        self.session: RolloutSession | None = None
        """The engine's thread; on rank 0 only, from ``setup`` to ``teardown``."""
        self.training: TrainingStream | None = None
        """The training stream, in ``fit``."""
        self.has_begun = False
        """Whether ``fit`` is past restoring and starting, so that there is something to save."""
        self._streams: dict[str, PromptStream] = {}
        self._identity: DataIdentity | None = None
        self._stop_ids: tuple[int, ...] = ()
        self.exchange: Exchange | None = None
        """Between ranks, from ``setup`` on."""
        self.transport: Transport | None = None
        """This rank's way of weights to the engine, from the first sync on."""
        self._probe_tokens = 0
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
        trusted = self.trust_remote_code
        config = load_config(self.model, trust_remote_code=trusted)
        self.settings.check_context(context_length(config))
        tokenizer = load_tokenizer(self.model, trust_remote_code=trusted)
        vocabulary = check_pretrained(self.model, config, tokenizer, trust_remote_code=trusted)
        sampling = self.settings.sampling
        sampling.check_vocabulary(vocabulary)
        ends = stop_token_ids(self.model, config, tokenizer)
        self._stop_ids = tuple(sorted({*ends, *sampling.stop_token_ids}))
        self._open_streams(stage, tokenizer)
        shape = BatchShape(
            world_size=self.trainer.world_size,
            updates=self.settings.updates_per_batch,
            micro_batches=self.trainer.accumulate_grad_batches,
            hidden_size=int(getattr(config, "hidden_size", 1024)),
        )
        if stage == "fit":
            self._check_training(shape)
        check_sync(self.trainer)
        write_before_sync(self.trainer)
        directory_of(self.trainer)
        for callback in callbacks(self.trainer):
            if isinstance(callback, RunWriter):
                callback.open(self.trainer, stage)
        spec = EngineSpec(
            model=self.model,
            max_num_seqs=self.settings.cap,
            # One more than is ever trained on, so that the parity probe can score the longest.
            max_model_len=min(self.settings.max_sequence_tokens + 1, context_length(config)),
            vocab_size=vocabulary,
            seed=self.settings.seed,
            adapter=getattr(self.trainer.lightning_module, "adapter", None),
            trust_remote_code=trusted,
        )
        self.engine.validate(spec)
        self._probe_tokens = spec.max_model_len - 1
        self.exchange = self.exchange or Exchange()
        run = self._continuity(shape) if stage == "fit" else None
        with self.exchange.leading():
            if self.trainer.is_global_zero:
                check_resumed(self.trainer, self, run)
            if self.trainer.is_global_zero and self.session is None:
                decode = ResponseDecoder(
                    tokenizer, ends, special_tokens=self.template.special_tokens
                )
                stop = tuple(sampling.stop)
                self.session = RolloutSession(
                    self.engine, spec, self.scorer, decode, stop, self._while_waiting
                )
        self.training = None
        if run is not None:
            run.warn()
            self.training = TrainingStream(
                self.trainer,
                self.session,
                run,
                advantage=self.advantage,
                exchange=self.exchange,
                observer=self._observe,
            )

    def _check_training(self, shape: BatchShape) -> None:
        check_limits(self.trainer)
        check_optimizer(self.trainer)
        shape.check(self.settings.batch_groups, self.settings.group_size)
        check_estimator(self.trainer, self.settings)
        epoch = shape.epoch(len(self._streams["prompts"]), self.settings.batch_groups)
        check_epochs(self.trainer, shape, epoch)

    def _continuity(self, shape: BatchShape) -> Continuity:
        assert self._identity is not None
        return Continuity(
            settings=self.settings,
            shape=shape,
            stop_token_ids=self._stop_ids,
            reward=self.scorer.name,
            special_tokens=self.template.special_tokens,
            prompts=self._streams["prompts"],
            identity=self._identity,
        )

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
                self._last_state = self.training.state_dict() if self.training is not None else {}
            finally:
                self.training = None
                session.close()

    def _open_streams(self, stage: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the prompt streams of a command and look at every prompt."""
        needed = _STAGE_PROMPTS[stage]
        if self.sources[needed] is None:
            raise ConfigurationError(f"{KEY}.{needed} is not set: `copris {stage}` needs prompts")
        for name in (needed, "val_prompts") if stage == "fit" else (needed,):
            source = self.sources[name]
            if source is None:
                continue
            limit = self.settings.max_prompt_tokens
            encode = PromptEncoder(
                tokenizer, max_prompt_tokens=limit, key=f"{KEY}.{name}", template=self.template
            )
            training = name == "prompts"
            stream = PromptStream(
                source,
                encode,
                seed=self.settings.seed if training else None,
                epochs=None if training else 1,
                indices=usable_prompts(source, encode, skip_long=self.skip_long_prompts),
                key=f"{KEY}.{name}",
            )
            if training:
                self._identity = DataIdentity.of(stream)
            self._streams[name] = stream

    def update_weights(self, weights: Weights, version: int) -> None:
        """Give the engine new weights; tokens generated from now on bear ``version``.

        Args:
            weights: begins a pass over them; all ranks must call this with theirs.
            version: the policy version that they are.

        Raises:
            WeightSyncError: they did not arrive.
        """
        assert self.exchange is not None
        if self.transport is None:
            self.transport = self.engine.transport(self.exchange.rank, self._run)
        with self.exchange.leading():
            self._run(self.engine.hold())
        with self.exchange.leading():
            self.transport.send(weights)
            self._run(self.engine.release(version))
        if self.training is not None:
            self.training.advance(version)

    def explain(self, weights: Weights) -> str:
        """Which of the weights the engine does not compute with; all ranks must ask, and rank 0 is
        answered."""
        assert self.exchange is not None
        assert self.transport is not None
        with self.exchange.leading():
            return self.transport.explain(weights)

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
        names: list[str] = []
        sequences: list[list[int]] = []
        groups = self.training.delivered if self.training is not None else []
        for trajectory in (group.trajectories[0] for group in groups[:count]):
            names.append(trajectory.prompt_id)
            tokens = [*trajectory.prompt_token_ids, *trajectory.response_token_ids]
            sequences.append(tokens[: self._probe_tokens])
        if not sequences:
            stream = next(iter(self._streams.values()))
            for queued in islice(stream, count):
                names.append(queued.prompt.id)
                # A prompt of one token predicts nothing by itself.
                sequences.append([*queued.token_ids, *self._stop_ids[:1]])
        return names, sequences

    # -- loaders ---------------------------------------------------------------------------

    def train_dataloader(self) -> SizedStream:
        """Micro-batches; asking for the first of a batch rolls it out."""
        if self.training is None:  # DeepSpeed looks for a batch size here, whatever the command
            return SizedStream(0, lambda: iter(()))
        return SizedStream(len(self.training), self._micro_batches)

    def _micro_batches(self) -> Iterator[Any]:
        assert self.training is not None
        self.has_begun = True
        yield from self.training

    def val_dataloader(self) -> SizedStream | list[Any]:
        """Evaluated prompts of ``val_prompts``; nothing if there are none."""
        return self._evaluation("val_prompts") if "val_prompts" in self._streams else []

    def test_dataloader(self) -> SizedStream:
        """Evaluated prompts of ``test_prompts``."""
        return self._evaluation("test_prompts")

    def predict_dataloader(self) -> SizedStream:
        """Responses to ``predict_prompts``."""
        return self._evaluation("predict_prompts")

    def _evaluation(self, name: str) -> SizedStream:
        stream, exchange = self._streams[name], self.exchange
        assert exchange is not None
        return SizedStream(
            evaluation_batches(len(stream), self.settings),
            lambda: evaluate(self.session, stream, self.settings, self._stop_ids, exchange),
        )

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
        if self.training is not None and self.training.is_collecting:
            for callback in callbacks(self.trainer):
                if isinstance(callback, RolloutListener):
                    callback.on_rollout_progress(self.training.progress())

    # -- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Buffer, prompt position and open batch: rank 0's, which is what Lightning saves.

        ZeRO-3 saves a file per rank. The others' must not be empty, or they would not be asked to
        load anything, while rank 0 waits for them.
        """
        if self.training is None:
            return self._last_state
        return self.training.state_dict() or {"rank": self.exchange.rank if self.exchange else 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from rank 0's state in a checkpoint; evaluation has none."""
        if self.training is not None and state_dict:
            assert self.exchange is not None
            self.training.load_state_dict(self.exchange.broadcast(state_dict))
