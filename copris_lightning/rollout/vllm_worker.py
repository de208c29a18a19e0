"""What runs inside vLLM's own worker processes: loading the trainer's weights, and checking."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from copris_lightning.rollout.owner import end_with_owner

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Worker
else:
    _Worker = object


class CoprisWorkerExtension(_Worker):
    """Methods that vLLM mixes into its worker class (``worker_extension_cls``)."""

    def describe(self, path: str) -> dict[str, Any]:
        """What a trainer must know of a server: how it was started, and whether it sees a file.

        Returns:
            ``logprobs_mode``; ``max_num_seqs``, of one data-parallel rank; ``sees_file``, whether
            ``path`` exists here.
        """
        return {
            "logprobs_mode": self.model_config.logprobs_mode,
            "max_num_seqs": self.scheduler_config.max_num_seqs,
            "sees_file": os.path.exists(path),
        }

    def load_trainer_weights(self, path: str) -> None:
        """Load a safetensors file of full tensors under checkpoint names."""
        self._reload(path)
        self._repack_tied_head()

    def _reload(self, path: str) -> None:
        # vLLM warns at every reload that rotary embeddings (which have no weights) and tied heads
        # (see below) were not loaded.
        log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            self.reload_weights(weights_iterator=_tensors(path))
        finally:
            log.setLevel(level)

    def _repack_tied_head(self) -> None:
        """A head tied to the embedding is not loaded itself, so vLLM keeps the copy of the old
        weights that its CPU kernel packed; pack the new ones."""
        module: Any
        for module in self._model().modules():
            if _is_head(module) and hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)

    def explain_mismatch(self, path: str) -> str:
        """Which parts of the model do not compute with the weights in the file.

        Loads them a second time, so it is for a run that is about to end.
        """
        before = self._fingerprints()
        self._reload(path)
        self._repack_tied_head()
        after = self._fingerprints()
        different = [name for name in before if not torch.equal(before[name], after[name])]
        if different:
            return f"the engine was not computing with the trainer's {', '.join(different)}"
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in before.values()})
        return (
            "all weights had arrived; the engine computes otherwise than the trainer (its dtype "
            f"is {', '.join(dtypes)})"
        )

    @torch.inference_mode()
    def _fingerprints(self) -> dict[str, Tensor]:
        """What each layer computes, by name. A linear layer's kernel may work on a packed copy
        of its weight, so it is asked for a product; other parameters are taken as they are."""
        prints: dict[str, Tensor] = {}
        for name, module in self._model().named_modules():
            width = getattr(module, "input_size_per_partition", None)
            if _is_head(module):
                width = module.embedding_dim
            if width is not None and hasattr(module, "quant_method"):
                dtype = self.model_config.dtype
                x = torch.sin(torch.arange(width, device=self.device))
                prints[name] = module.quant_method.apply(module, x.to(dtype)[None]).clone()
                continue
            for parameter_name, parameter in module.named_parameters(recurse=False):
                prints[f"{name}.{parameter_name}"] = parameter.detach().clone()
        return prints

    def _model(self) -> nn.Module:
        model: nn.Module = self.model_runner.get_model()
        return model


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


def _is_head(module: nn.Module) -> bool:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return isinstance(module, ParallelLMHead)


# A worker imports this module as soon as it starts: its owner may be killed while it boots.
end_with_owner()
