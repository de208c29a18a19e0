"""What runs inside vLLM's own worker processes: loading the trainer's weights, and checking."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil  # comes with vLLM
import torch
from safetensors import safe_open
from torch import Tensor, nn

from copris_lightning.rollout.vllm import TRAINER_VARIABLE

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Worker
else:
    _Worker = object


class CoprisWorkerExtension(_Worker):
    """Methods that vLLM mixes into its worker class (``worker_extension_cls``)."""

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


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that ended but that nobody waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end_with_trainer(host: str, trainer_pid: int, hand_over: str) -> None:
    """Watch the trainer from a daemon thread: if it is killed, leave nothing behind.

    Args:
        host: the trainer's.
        trainer_pid: its process.
        hand_over: how the paths of the directories begin through which it sends weights.
    """
    if socket.gethostname() != host or os.getpid() == trainer_pid:
        return  # another machine's process table says nothing about the trainer
    core_pid = os.getppid()  # the engine's core, or the trainer itself
    try:
        trainer: psutil.Process | None = psutil.Process(trainer_pid)
    except psutil.NoSuchProcess:
        trainer = None

    def watch() -> None:
        while trainer is not None and _is_alive(trainer):
            time.sleep(1.0)
        # Killed with SIGKILL, the trainer could tell no one: drop weights it was sending, end
        # the engine's core, then this process.
        for directory in glob.glob(f"{glob.escape(hand_over)}*"):
            shutil.rmtree(directory, ignore_errors=True)
        if os.getppid() == core_pid != trainer_pid:
            os.kill(core_pid, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="copris-trainer-watch", daemon=True).start()


# A worker imports this module as soon as it starts: the trainer may be killed while it boots.
if TRAINER_VARIABLE in os.environ:
    _host, _pid, _prefix = os.environ[TRAINER_VARIABLE].split("|")
    _end_with_trainer(_host, int(_pid), _prefix)
