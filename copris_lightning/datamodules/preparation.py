"""What a command needs, found and checked before anything slow starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from copris_lightning.core.sampling import Sampling
from copris_lightning.datamodules.continuity import Continuity
from copris_lightning.datamodules.divide import BatchShape
from copris_lightning.datamodules.identity import DataIdentity
from copris_lightning.datamodules.prompts.inspection import usable_prompts
from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptSource, PromptStream
from copris_lightning.datamodules.settings import RolloutSettings
from copris_lightning.engines.engine import EngineSpec
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.pretrained import (
    context_length,
    load_config,
    load_tokenizer,
    stop_token_ids,
)
from copris_lightning.policy.pretrained_checks import check_pretrained
from copris_lightning.rollout.decoding import ResponseDecoder


@dataclass(frozen=True)
class Preparation:
    """A command's prompts, and what the model says about tokens.

    Attributes:
        settings: of the rollout.
        spec: what the run needs from the engine.
        shape: how batches are divided.
        tokenizer: the model's.
        ends: the model's own end-of-sequence tokens.
        training: the training prompts, in ``fit``.
        identity: of these.
        evaluations: the prompts of the evaluations that belong to the command, by name.
        asks_logprobs: whether training uses the engine's log-probs.
    """

    settings: RolloutSettings
    spec: EngineSpec
    shape: BatchShape
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    training: PromptStream | None
    identity: DataIdentity | None
    evaluations: dict[str, PromptStream]
    asks_logprobs: bool

    @property
    def probe_tokens(self) -> int:
        """Longest sequence that the engine can be asked to score."""
        return self.spec.max_model_len - 1

    @property
    def prompts(self) -> PromptStream:
        """Some prompts, whatever the command."""
        return self.training or next(iter(self.evaluations.values()))

    @property
    def epoch(self) -> int:
        """Micro-batches of an epoch without limits."""
        assert self.training is not None
        return self.shape.epoch(len(self.training), self.settings.batch.groups)

    def stop_token_ids(self, sampling: Sampling) -> tuple[int, ...]:
        """Tokens that end a response, the model's own ends among them."""
        return tuple(sorted({*self.ends, *sampling.stop_token_ids}))

    def decoder(self) -> ResponseDecoder:
        """Response tokens to text."""
        special_tokens = self.settings.task.template.special_tokens
        return ResponseDecoder(self.tokenizer, self.ends, special_tokens=special_tokens)

    def continuity(self) -> Continuity:
        """What a checkpoint of this run must have in common with it."""
        assert self.training is not None
        assert self.identity is not None
        return Continuity(
            settings=self.settings,
            shape=self.shape,
            stop_token_ids=self.stop_token_ids(self.settings.task.sampling),
            prompts=self.training,
            identity=self.identity,
            asks_logprobs=self.asks_logprobs,
        )


def prepare(settings: RolloutSettings, model: str, trainer: Any, stage: str) -> Preparation:
    """Look at the checkpoint and at every prompt of a command.

    Args:
        settings: of the rollout.
        model: path or hub name of the checkpoint.
        trainer: knows the policy and how a batch is divided.
        stage: the command.

    Raises:
        ConfigurationError: names the setting that cannot work.
    """
    module = trainer.lightning_module
    trusted = bool(getattr(module, "trust_remote_code", False))
    config = load_config(model, trust_remote_code=trusted)
    context = context_length(config)
    tokenizer = load_tokenizer(model, trust_remote_code=trusted)
    vocabulary = check_pretrained(model, config, tokenizer, trust_remote_code=trusted)
    settings.check_model(context, vocabulary)
    training = None
    if stage == "fit":
        training = _stream(settings, tokenizer, "task", settings.task.prompts)
    return Preparation(
        settings=settings,
        spec=EngineSpec(
            model=model,
            max_num_seqs=settings.flow.bounds.most,
            # One more than is ever trained on, so that the parity probe can score the longest.
            max_model_len=min(settings.max_sequence_tokens + 1, context),
            vocab_size=vocabulary,
            seed=settings.seed,
            adapter=getattr(module, "adapter", None),
            trust_remote_code=trusted,
            keeps=settings.flow.keeps,
            streams=settings.flow.streams,
            min_num_seqs=settings.flow.bounds.least,
        ),
        shape=BatchShape(
            world_size=trainer.world_size,
            updates=settings.batch.updates,
            micro_batches=trainer.accumulate_grad_batches,
            hidden_size=int(getattr(config, "hidden_size", 1024)),
        ),
        tokenizer=tokenizer,
        ends=stop_token_ids(model, config, tokenizer),
        training=training,
        identity=None if training is None else DataIdentity.of(training),
        evaluations=_evaluations(settings, tokenizer, stage),
        asks_logprobs=_asks_logprobs(settings, module),
    )


def _asks_logprobs(settings: RolloutSettings, module: Any) -> bool:
    if settings.flow.source == "engine":
        return True
    estimator = getattr(module, "estimator", None)
    return bool(estimator is not None and estimator.needs_mismatch)


def _evaluations(
    settings: RolloutSettings, tokenizer: PreTrainedTokenizerBase, stage: str
) -> dict[str, PromptStream]:
    command = "validate" if stage == "fit" else stage
    found = {
        name: _stream(settings, tokenizer, f"evaluations.{name}", evaluation.prompts)
        for name, evaluation in settings.evaluations.items()
        if evaluation.on == command
    }
    if stage != "fit" and not found:
        raise ConfigurationError(
            f"evaluations: none of {list(settings.evaluations)} is on={stage}, and "
            f"`copris {stage}` needs prompts"
        )
    return found


def _stream(
    settings: RolloutSettings,
    tokenizer: PreTrainedTokenizerBase,
    owner: str,
    source: PromptSource,
) -> PromptStream:
    task, key = settings.task, f"{owner}.prompts"
    encode = PromptEncoder(
        tokenizer, max_prompt_tokens=task.max_prompt_tokens, key=key, template=task.template
    )
    is_training = owner == "task"
    return PromptStream(
        source,
        encode,
        seed=settings.seed if is_training else None,
        epochs=None if is_training else 1,
        indices=usable_prompts(source, encode, skip_long=task.skip_long_prompts),
        key=key,
    )
