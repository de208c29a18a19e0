"""What runs inside vLLM's own worker processes: loading the trainer's weights, and checking."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor, nn

from copris_lightning.rollout.arrival import Arrival, is_head
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

    def load_trainer_weights(self, path: str) -> dict[str, Any]:
        """Load a safetensors file of full tensors as a checkpoint has them.

        Returns:
            what of it did not arrive: :meth:`Arrival.report`.
        """
        self._arrival = getattr(self, "_arrival", None) or Arrival(
            self._model(), self.model_config.dtype
        )
        with self._arrival.watching(_tensors(path)) as tensors:
            self._reload(tensors)
            self._repack_tied_head()
        return self._arrival.report()

    def _reload(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        # vLLM warns at every reload that rotary embeddings (which have no weights) and tied heads
        # (see below) were not loaded.
        log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            self._forget_packed_experts()
            self.reload_weights(weights_iterator=tensors)
        finally:
            log.setLevel(level)

    def _forget_packed_experts(self) -> None:
        """vLLM packs the experts' weights for its CPU kernel when it makes that kernel, which it
        does once: at a reload they would stay unpacked. Without a kernel it makes a new one."""
        if self.device.type != "cpu":
            return
        for module in self._model().modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None

    def _repack_tied_head(self) -> None:
        """A head tied to the embedding is not loaded itself, so vLLM keeps the copy of the old
        weights that its CPU kernel packed; pack the new ones."""
        module: Any
        for module in self._model().modules():
            if is_head(module) and hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)

    def explain_mismatch(self, path: str) -> str:
        """What can be said of the weights in the file and of those that the engine has now."""
        arrival: Arrival | None = getattr(self, "_arrival", None)
        if arrival is None:
            return "what the engine computes with is not known: nothing was loaded in this way"
        return arrival.explain(_tensors(path))

    def _model(self) -> nn.Module:
        model: nn.Module = self.model_runner.get_model()
        return model


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            yield name, file.get_tensor(name)


# A worker imports this module as soon as it starts: its owner may be killed while it boots.
end_with_owner()
