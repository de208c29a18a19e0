"""The LightningModule: log-probs of the policy, the IS-corrected loss, and what to log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from copris_lightning.core.batching import MicroBatch
from copris_lightning.core.evaluation import EvaluationBatch, avg_at_k, pass_at_k
from copris_lightning.core.logprobs import token_logprobs
from copris_lightning.core.losses import ClippedPolicyLoss, TokenLoss
from copris_lightning.errors import ConfigurationError
from copris_lightning.pretrained import load_config, load_policy


class PolicyLoss(Protocol):
    """A loss per token; :class:`ClippedPolicyLoss` is one. Annotations are wide on purpose, as in
    :class:`PromptSource`."""

    def __call__(self, logprobs: Any, behavior_logprobs: Any, advantages: Any, /) -> Any:
        """Tensors ``[B, R]``, ``[B, R]`` and ``[B, 1]`` to a :class:`TokenLoss` of ``[B, R]``."""
        ...


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return AdamW(parameters, lr=1e-6)


class CoprisModule(L.LightningModule):
    """A language model trained with CoPRIS's cross-stage importance sampling.

    Args:
        model: path or hub name of a causal language model.
        loss: the policy loss; token means are taken over the whole optimizer step, however it is
            split into micro-batches and ranks.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer; steps once per optimizer step.
        dtype: of the parameters: ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: as for ``from_pretrained``.
        gradient_checkpointing: recompute activations in the backward pass.
        logprob_chunk_tokens: tokens whose logits are held at a time.
        pass_threshold: an evaluated sample passes with at least this reward.

    Raises:
        ConfigurationError: the model cannot be found or is not supported.
    """

    def __init__(
        self,
        model: str,
        loss: PolicyLoss | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: str = "float32",
        attn_implementation: str = "sdpa",
        gradient_checkpointing: bool = False,
        logprob_chunk_tokens: int = 1024,
        pass_threshold: float = 1.0,
    ) -> None:
        super().__init__()
        if logprob_chunk_tokens < 1:
            raise ConfigurationError(
                f"model.init_args.logprob_chunk_tokens={logprob_chunk_tokens} must be at least 1"
            )
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigurationError(
                f"model.init_args.dtype={dtype!r} must be float32, bfloat16 or float16"
            )
        load_config(model)
        self.model = model
        self.loss = loss or ClippedPolicyLoss()
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.dtype_name = dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.logprob_chunk_tokens = logprob_chunk_tokens
        self.pass_threshold = pass_threshold
        self.policy: PreTrainedModel | None = None
        self.train_loss = MeanMetric()

    def configure_model(self) -> None:
        """Load the policy; Lightning calls this in every process, before training."""
        if self.policy is not None:
            return
        self.policy = load_policy(
            self.model, dtype=self.dtype_name, attn_implementation=self.attn_implementation
        )
        if self.gradient_checkpointing:
            self.policy.gradient_checkpointing_enable()
        # from_pretrained returns the model in eval mode, in which Lightning would leave it.
        self.policy.train()
        # The engine has no dropout, and a policy with it is not the one that is synced.
        layer: Any
        for layer in self.policy.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            elif isinstance(getattr(layer, "attention_dropout", None), float):
                layer.attention_dropout = 0.0

    def configure_optimizers(self) -> Any:
        """The optimizer and, if there is one, its schedule per optimizer step."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def token_logprobs(self, batch: MicroBatch) -> Tensor:
        """Log-probs of the response tokens under the current policy, ``[B, R]``, 0 at padding."""
        assert self.policy is not None, "configure_model() has not run"
        output = self.policy.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
        mask, positions = batch.response_mask, batch.response_positions
        rows = torch.arange(len(positions), device=positions.device)[:, None].expand_as(positions)
        # The output at one position predicts the token at the next.
        hidden = output.last_hidden_state[rows[mask], positions[mask] - 1]
        values = token_logprobs(
            hidden,
            batch.input_ids[rows[mask], positions[mask]],
            self.policy.get_output_embeddings(),
            temperature=batch.temperature,
            chunk_tokens=self.logprob_chunk_tokens,
        )
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    def policy_loss(self, batch: MicroBatch) -> tuple[Tensor, TokenLoss]:
        """Sum of the token losses of a micro-batch, and its per-token parts, ``[B, R]``."""
        parts: TokenLoss = self.loss(
            self.token_logprobs(batch), batch.behavior_logprobs, batch.advantages[:, None]
        )
        return torch.where(batch.response_mask, parts.loss, 0.0).sum(), parts

    def training_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Tensor]:
        """One micro-batch's share of the optimizer step's token mean.

        Lightning averages gradients over ``accumulate_grad_batches`` micro-batches and strategies
        average over ranks; both are undone, so that the sum of the shares is the mean over all
        response tokens of the step.
        """
        total, parts = self.policy_loss(batch)
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        tokens = batch.response_lengths.sum()
        self.train_loss.update(total.detach() / tokens, weight=tokens)
        if batch.is_last:
            self.log("train/loss", self.train_loss.compute())
            self.train_loss.reset()
            for name, value in batch.metrics.items():
                self.log(name, value, rank_zero_only=True)
        return {
            "loss": total * (shares / batch.update_tokens),
            "ratio": parts.ratio,
            "clipped": parts.clipped,
        }

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> Tensor:
        """:meth:`token_logprobs` without gradient."""
        return self.token_logprobs(batch)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's full tensors under the checkpoint's names, tied ones once."""
        assert self.policy is not None, "configure_model() has not run"
        for name, parameter in self.policy.named_parameters():
            yield name, parameter.detach()

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Log the scores of some prompts."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Log the scores of some prompts."""
        self._log_evaluation("test", batch)

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The responses, as records like the ledger's."""
        return batch.records

    def _log_evaluation(self, area: str, batch: EvaluationBatch) -> None:
        figures = {
            f"{area}/avg_at_k": avg_at_k(batch.rewards).mean(),
            f"{area}/pass_at_k": pass_at_k(batch.rewards, self.pass_threshold).mean(),
            f"{area}/response_tokens": batch.response_lengths.float().mean(),
        }
        self.log_dict(
            figures, on_epoch=True, prog_bar=True, batch_size=len(batch.rewards), sync_dist=True
        )
