"""The LightningModule: log-probs of the policy, the IS-corrected loss, and what to log."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import AdamW
from torchmetrics import MeanMetric

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.estimator.estimator import Estimate, Estimator
from copris_lightning.core.estimator.normalization import NORMALIZATIONS
from copris_lightning.core.estimator.ratios import TokenTerms
from copris_lightning.core.evaluation import EvaluationBatch, avg_at_k, pass_at_k
from copris_lightning.errors import ConfigurationError, QuarantineError, under
from copris_lightning.policy.kernels import apply_liger, check_liger
from copris_lightning.policy.lora import LoRA, without_adapters
from copris_lightning.policy.meeting import sum_over_ranks
from copris_lightning.policy.open_batch import OpenBatch
from copris_lightning.policy.policy import Policy
from copris_lightning.policy.pretrained import empty_model, load_config, load_model
from copris_lightning.policy.pretrained_checks import check_reference
from copris_lightning.policy.settings import Memory, Precision
from copris_lightning.policy.sharding import score, shard
from copris_lightning.policy.zero import splitting
from copris_lightning.weights.adapter import AdapterShape
from copris_lightning.weights.export import as_saved, saved_buffers
from copris_lightning.weights.gather import full_weights


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return AdamW(parameters, lr=1e-6)


class CoprisModule(L.LightningModule):
    """A language model trained with CoPRIS's cross-stage importance sampling.

    Args:
        model: path or hub name of a causal language model.
        estimator: the loss of each token, and how it is normalized.
        lora: train adapters only; by default all weights.
        optimizer: makes the optimizer from the parameters that are trained.
        lr_scheduler: makes the schedule from the optimizer; steps once per optimizer step.
        precision: what the policy is held and computed in.
        memory: what a step keeps, and what it computes again instead.
        trust_remote_code: run code that the checkpoint brings along, here and for the rollout.

    Raises:
        ConfigurationError: the model cannot be found or is not supported.
    """

    def __init__(
        self,
        model: str,
        estimator: Estimator = Estimator(),  # noqa: B008 - frozen
        lora: LoRA | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        precision: Precision = Precision(),  # noqa: B008 - frozen
        memory: Memory = Memory(),  # noqa: B008 - frozen
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        config = load_config(model, trust_remote_code=trust_remote_code)
        reference = estimator.kl.reference if estimator.kl is not None else None
        if reference is not None:
            theirs = load_config(
                reference, key="estimator.kl.reference", trust_remote_code=trust_remote_code
            )
            check_reference(config, theirs, reference)
        if lora is not None:
            with under("lora"):
                lora.check(empty_model(model, trust_remote_code=trust_remote_code))
        if precision.liger:
            check_liger(config)
        self.model = model
        self.estimator = estimator
        self.lora = lora
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.precision = precision
        self.memory = memory
        self.trust_remote_code = trust_remote_code
        self.policy: Policy | None = None
        # In a list, so that its weights are neither trained nor saved nor synced.
        self._reference: list[Policy] = []
        self.train_loss = MeanMetric()
        self._open_batch = OpenBatch(self.train_loss)

    def setup(self, stage: str) -> None:
        """Forget a batch that an earlier command left unfinished."""
        self._open_batch.reset()

    def configure_model(self) -> None:
        """Load the policy; Lightning calls this in every process, before training."""
        if self.policy is not None:
            return
        strategy = self._trainer.strategy if self._trainer is not None else None
        with splitting(strategy):
            self.policy = self._load(self.model, is_trained=True)
        if self.memory.gradient_checkpointing:
            self.policy.model.gradient_checkpointing_enable()

    def _load(self, model: str, *, is_trained: bool) -> Policy:
        """A policy, split over ranks where that is done before training."""
        loaded = load_model(
            model,
            dtype=self.precision.dtype,
            attn_implementation=self.precision.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        # from_pretrained returns the model in eval mode, in which Lightning would leave it.
        loaded.train(is_trained).requires_grad_(is_trained)
        if self.precision.liger:
            apply_liger(loaded)
        if is_trained and self.lora is not None:
            self.lora.insert(loaded)
        policy = Policy(loaded, chunk_tokens=self.memory.logprob_chunk_tokens)
        if self.device_mesh is not None:
            shard(policy, loaded, self.device_mesh["data_parallel"])
        return policy

    def configure_optimizers(self) -> Any:
        """The optimizer and, if there is one, its schedule per optimizer step."""
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        """Load the reference policy, if there is a penalty, where the policy is."""
        kl = self.estimator.kl
        if kl is not None and not self._reference and not self._holds_reference:
            reference = self._load(kl.reference or self.model, is_trained=False)
            self._reference = [reference.to(self.device)]

    def pack(self) -> None:
        """Go over to passes without padding, if set; on all ranks, once weights are restored."""
        if self.memory.packing:
            assert self.policy is not None, "configure_model() has not run"
            self.policy.pack(lambda batch: score(self.trainer, batch))
            for policy in self._reference:
                policy.pack(policy.ask)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Log-probs of the response tokens under the current policy, ``[B, R]``, 0 at padding."""
        assert self.policy is not None, "configure_model() has not run"
        logprobs, _ = self.policy(batch)
        return cast("Tensor", logprobs)

    def token_terms(self, batch: MicroBatch) -> TokenTerms:
        """What the estimator needs to know of a micro-batch's tokens."""
        assert self.policy is not None, "configure_model() has not run"
        logprobs, entropy = self.policy(batch, self.estimator.entropy_mode)
        return TokenTerms(
            logprobs=logprobs,
            behavior_logprobs=batch.behavior_logprobs,
            advantages=batch.advantages[:, None],
            mask=batch.loss_mask,
            lags=batch.lags,
            mismatch=batch.mismatch,
            proximal_logprobs=batch.proximal_logprobs,
            reference_logprobs=self._reference_logprobs(batch),
            entropy=entropy,
        )

    @property
    def _holds_reference(self) -> bool:
        """Whether the policy without its adapters is the reference policy."""
        kl = self.estimator.kl
        return self.lora is not None and kl is not None and kl.reference is None

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> Tensor | None:
        if self._holds_reference:
            assert self.policy is not None
            with without_adapters(self.policy):
                return cast("Tensor", self(batch))
        return self._reference[0](batch)[0] if self._reference else None

    def policy_loss(self, batch: MicroBatch, terms: TokenTerms) -> tuple[Tensor, Estimate]:
        """A micro-batch's share of the optimizer step's loss, and its per-token parts."""
        estimate = self.estimator(terms)
        normalize = NORMALIZATIONS[self.estimator.normalization]
        weights = normalize(batch.written_lengths, batch.totals)
        return (estimate.loss.sum(dim=1) * weights).sum(), estimate

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch's share of the optimizer step's loss.

        Lightning averages gradients over ``accumulate_grad_batches`` micro-batches and strategies
        average over ranks; both are undone, so that the shares add up to the step's loss.

        Returns:
            ``loss``; ``estimate``, the :class:`Estimate` without its graph; ``quarantined``, the
            names of trajectories whose log-probs were not finite; ``waited_s``, the seconds that
            this rank waited for the others.
        """
        terms = self.token_terms(batch)
        broken = terms.not_finite
        # Over all ranks: with split weights, what one computes again they have to.
        counts = torch.stack([broken.sum(), (broken & batch.included).sum()]).float()
        (any_broken, counted), waited_s = sum_over_ranks(self.trainer.strategy, counts)
        quarantined = []
        if any_broken:
            flags = (broken & batch.included).tolist()
            quarantined = [name for name, bad in zip(batch.names, flags, strict=True) if bad]
            self._quarantine(batch, quarantined, int(counted))
            # Not even a loss of zero would do for these rows: its gradient is zero times NaN.
            batch = batch.placeholder() if broken.all() else batch.rows(~broken)
            terms = self.token_terms(batch)
            if terms.not_finite.any():
                raise QuarantineError(
                    f"the policy's log-probs are not finite for any input. {self._broken_weights}"
                )
        loss, estimate = self.policy_loss(batch, terms)
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        self.train_loss.update(loss.detach() * shares)
        if batch.is_last:
            self._open_batch.quarantined = 0
            self.log("train/loss", self.train_loss.compute())
            self.train_loss.reset()
            for name, value in batch.metrics.items():
                self.log(name, value, rank_zero_only=True)
        self._open_batch.keep(self.trainer, batch_idx, is_last=batch.is_last)
        estimate.loss = estimate.loss.detach()
        if self.trainer.strategy.handles_gradient_accumulation:
            # DeepSpeed averages over micro-batches once more.
            loss = loss * self.trainer.accumulate_grad_batches
        outputs = {"estimate": estimate, "quarantined": quarantined, "waited_s": waited_s}
        return {"loss": loss * shares, **outputs}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The open batch's figures, at the last whole optimizer step."""
        self._open_batch.save(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on adding up the open batch's figures."""
        self._open_batch.load(self.trainer, checkpoint)

    def _quarantine(self, batch: MicroBatch, names: list[str], count: int) -> None:
        """Count trajectories of all ranks; ``names`` are this rank's."""
        self._open_batch.quarantined += count
        if self._open_batch.quarantined > batch.quarantine_limit:
            raise QuarantineError(
                f"the policy's log-probs are not finite for {self._open_batch.quarantined} "
                f"trajectories of a batch, {', '.join(names) or 'on another rank'} among them; "
                f"credit.max_quarantined allows {batch.quarantine_limit}. "
                f"{self._broken_weights}"
            )
        if names:  # on whichever rank it happens
            warnings.warn(
                f"quarantined, since the policy's log-probs are not finite: {', '.join(names)}",
                stacklevel=3,
            )

    @property
    def _broken_weights(self) -> str:
        return f"the weights or their precision (precision.dtype={self.precision.dtype}) are broken"

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer is told to. FSDP1's norm is only known to its root module."""
        root = self.trainer.strategy.model
        if isinstance(root, FullyShardedDataParallel) and gradient_clip_val is not None:
            if gradient_clip_algorithm not in (None, "norm"):
                raise ConfigurationError(
                    f"trainer.gradient_clip_algorithm={gradient_clip_algorithm} cannot be had with "
                    "trainer.strategy=fsdp; use norm"
                )
            root.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def expected_weights(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the policy's weights in a checkpoint; the model is not loaded."""
        model = empty_model(self.model, trust_remote_code=self.trust_remote_code)
        if self.lora is not None:
            self.lora.insert(model)
        return ((f"policy.model.{n}", tuple(t.shape)) for n, t in model.state_dict().items())

    @property
    def adapter(self) -> AdapterShape | None:
        """What the engine gets in place of whole weights, if it does."""
        if self.lora is None:
            return None
        return self.lora.shape(empty_model(self.model, trust_remote_code=self.trust_remote_code))

    def named_weights(self, root: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        """The policy's full tensors as ``save_pretrained`` would write them, tied ones once.

        All ranks must go through all of them; see :func:`full_weights`.

        Args:
            root: what the strategy made of this module.
        """
        assert self.policy is not None, "configure_model() has not run"
        model = self.policy.model
        weights = chain(full_weights(model, root or self), saved_buffers(model))
        if self.lora is None:
            yield from as_saved(model, weights)
        elif self.lora.sync == "merge":
            yield from as_saved(model, self.lora.merged(weights))
        else:
            yield from self.lora.adapters(weights)

    def validation_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the scores of some prompts."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the scores of some prompts."""
        self._log_evaluation("test", batch)

    def predict_step(
        self, batch: EvaluationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """The responses, as records like the ledger's."""
        return batch.records

    def _log_evaluation(self, area: str, batch: EvaluationBatch) -> None:
        name = f"{area}/{batch.name}"
        figures = {
            f"{name}/avg_at_k": avg_at_k(batch.rewards).mean(),
            f"{name}/pass_at_k": pass_at_k(batch.rewards, batch.pass_threshold).mean(),
            f"{name}/response_tokens": batch.response_lengths.float().mean(),
        }
        self.log_dict(
            figures,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(batch.rewards),
            sync_dist=True,
            add_dataloader_idx=False,
        )
