"""What runs inside vLLM's own worker processes: loading the trainer's weights, and checking."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from copris_lightning.engines.owner import end_with_owner
from copris_lightning.weights.adapter import ADAPTER_ID, adapter_report
from copris_lightning.weights.arrival import Arrival, is_head
from copris_lightning.weights.shard_file import mapped_tensors

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

    def begin_shards(self) -> None:
        """Make ready for all of a checkpoint's tensors, which come in files, one at a time.

        vLLM gathers what belongs to a layer, whichever file it comes in, and hands a layer to its
        kernel when it is whole.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if getattr(
            self, "_has_open_load", False
        ):  # it failed; what it left would be taken for ours
            self._finish_layers()
        self._has_open_load = True
        self._forget_packed_experts()
        self._new_arrival().begin()
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self._model())

    def load_shard(self, path: str) -> None:
        """Load a safetensors file of full tensors as a checkpoint has them."""
        from vllm.config import set_current_vllm_config

        model: Any = self._model()
        with set_current_vllm_config(self.vllm_config), self._arrival.watching() as watched:
            model.load_weights(watched(mapped_tensors(path)))
            self._own_waiting_tensors()

    def end_shards(self) -> dict[str, Any]:
        """All files were loaded.

        Returns:
            what did not arrive: :meth:`Arrival.report`.
        """
        with self._arrival.watching():
            self._finish_layers()
            self._repack_tied_head()
        self._has_open_load = False
        # As vLLM does after a reload: these were computed with the old weights.
        self.model_runner.reset_lora_state()
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()
        return self._arrival.end()

    def watch_transfer(self) -> None:
        """Before vLLM's own weight transfer: look on, until :meth:`transfer_report`."""
        model: Any = self._model()
        load = type(model).load_weights
        failed: ExitStack | None = getattr(self, "_looking_on", None)
        if failed is not None:
            failed.close()
        self._looking_on = ExitStack()
        self._new_arrival().begin()
        watched = self._looking_on.enter_context(self._arrival.watching())
        model.load_weights = lambda weights: load(model, watched(weights))
        self._looking_on.callback(delattr, model, "load_weights")

    def transfer_report(self) -> dict[str, Any]:
        """After it: what did not arrive, :meth:`Arrival.report`."""
        self._looking_on.close()
        report = self._arrival.end()
        if not self._arrival.sent:  # a backend that loads in another way
            return {"stale": [], "missing": [], "unused": [], "not_compared": ["all"]}
        return report

    def adapter_report(self, path: str) -> dict[str, Any]:
        """What of a file of adapters the engine does not apply, as :meth:`Arrival.report`."""
        manager: Any = self.model_runner.lora_manager._adapter_manager
        if self.parallel_config.tensor_parallel_size > 1:
            return {"stale": [], "missing": [], "unused": [], "not_compared": ["adapters"]}
        slot = manager.lora_index_to_id.index(ADAPTER_ID)
        held = [
            [stack[slot] for stack in stacks]
            for module in manager.modules.values()
            for stacks in (module.lora_a_stacked, module.lora_b_stacked)
        ]
        return adapter_report(mapped_tensors(path), held)

    def _new_arrival(self) -> Arrival:
        if not hasattr(self, "_arrival"):
            self._arrival = Arrival(self._model(), self.model_config.dtype)
        return self._arrival

    def _finish_layers(self) -> None:
        """Hand those layers to their kernels that are not whole (they are padded), and put back
        those that nothing came for."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # vLLM warns that rotary embeddings (which have no weights) and tied heads (see below) were
        # not loaded.
        log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(self._model(), self.model_config)
        finally:
            log.setLevel(level)

    def _own_waiting_tensors(self) -> None:
        """Copy what vLLM keeps of a file for layers that are not whole yet: the file is written
        over, whether or not the rest comes."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        for module in self._model().modules():
            for _, call in get_layerwise_info(module).loaded_weights:
                for key, value in call.arguments.items():
                    if isinstance(value, Tensor) and not value.is_meta:
                        call.arguments[key] = value.clone()

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

    def explain_mismatch(self, paths: list[str]) -> str:
        """What can be said of the weights in the files and of those that the engine has now."""
        if not hasattr(self, "_arrival"):
            return "what the engine has could not be found out: nothing was sent to it in this way"
        return self._arrival.explain(chain.from_iterable(map(mapped_tensors, paths)))

    def _model(self) -> nn.Module:
        model: nn.Module = self.model_runner.get_model()
        return model


# A worker imports this module as soon as it starts: its owner may be killed while it boots.
end_with_owner()
