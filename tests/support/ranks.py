"""What two processes do together for ``tests/test_distributed.py``: one start, many scenarios.

Run as ``ranks.py CHECKPOINT DIRECTORY SCENARIO...`` by each rank, with torchrun's variables set.
Writes each scenario's result on each rank to ``DIRECTORY/SCENARIO.RANK.pt``.
"""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from architectures import tiny_architecture
from copris_testing import SomePrompts, digest, full_state
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from receivers import ListeningReceiver
from safetensors.torch import load_file
from simulated_fits import build, ledger
from some_rewards import SlowFirst
from some_rewards import failing as failing_reward
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor

from copris_lightning import Evaluation, LoRA
from copris_lightning.core.estimator.penalties import KLPenalty
from copris_lightning.errors import ConfigurationError, RewardError, RolloutError
from copris_lightning.policy.policy import Policy
from copris_lightning.policy.pretrained import load_model
from copris_lightning.policy.sharding import shard
from copris_lightning.weights.export import as_saved, saved_buffers
from copris_lightning.weights.files import FilesTransport
from copris_lightning.weights.gather import full_weights

TIME_LIMIT_S = 30
"""Of the default process group: how long one rank may wait for another in a collective."""

SCENARIOS: dict[str, Callable[[Path, Path], Any]] = {}


def scenario(function: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def strategies() -> dict[str, Any]:
    return {
        "one": "auto",
        "ddp": DDPStrategy(),
        "fsdp2": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False),
        "fsdp2_in_parts": ModelParallelStrategy(2, 1, save_distributed_checkpoint=True),
        "fsdp2_without_sizes": ModelParallelStrategy(),
    }


class Recorder(L.Callback):
    """The gradient before each step in full, each batch's loss, and the weights after it."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parts = [self.gradient(p) for p in pl_module.policy.parameters() if p.requires_grad]
        self.gradients.append(torch.cat([g.flatten().clone() for g in parts]))

    def gradient(self, parameter: Any) -> torch.Tensor:
        grad: Any = parameter.grad
        full: torch.Tensor = grad.full_tensor() if isinstance(grad, DTensor) else grad
        return full

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if args[1].is_last:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.weights.append(full_state(pl_module.policy.model))


class DigestingReceiver(ListeningReceiver):
    """Writes down a digest of each weight that came in a load."""

    def __init__(self, synced: list[dict[str, str]]) -> None:
        super().__init__()
        self.synced = synced

    async def end_load(self) -> None:
        self.synced.append({n: digest(t) for shard in self.shards for n, t in shard.items()})

    async def load_adapter(self, folder: Path) -> None:
        adapter = load_file(folder / "adapter_model.safetensors")
        self.synced.append({name: digest(tensor) for name, tensor in adapter.items()})


def train(
    strategy: str | Strategy,
    checkpoint: Path,
    directory: Path,
    *,
    recorder: Recorder | None = None,
    callbacks: Sequence[L.Callback] = (),
    ckpt_path: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Batches of two micro-batches per rank, their gradients clipped."""
    recorder = recorder or Recorder()
    synced: list[dict[str, str]] = []
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.02, "max_steps": 3, **options}
    trainer, module, data, _ = build(
        checkpoint,
        directory,
        callbacks=[recorder, *callbacks],
        strategy=strategies()[strategy] if isinstance(strategy, str) else strategy,
        devices=1 if strategy == "one" else 2,
        **settings,
    )
    # With a state, which FSDP2 splits too.
    module.optimizer = lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)
    data.engine.transport = lambda rank, run: FilesTransport(
        DigestingReceiver(synced), str(directory), rank, run, shard_bytes=20_000
    )
    torch.manual_seed(0)  # adapters start from random numbers
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return {
        "losses": recorder.losses,
        "gradients": recorder.gradients,
        "weights": recorder.weights,
        "synced": synced,
        "ledger": ledger(directory),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
    }


FLOWS: dict[str, dict[str, Any]] = {
    "staged_fresh": {},
    "staged_kept": {"kv": "kept"},
    "streaming_fresh": {"mode": "streaming"},
    "streaming_kept": {"mode": "streaming", "kv": "kept"},
}


def train_in(flow: str, strategy: str, checkpoint: Path, directory: Path) -> dict[str, Any]:
    """As :func:`train`, in a flow."""
    data = {**FLOWS[flow], "max_staleness": 2}
    return train(strategy, checkpoint, directory, data=data, max_steps=4)


IN_FLOWS = {
    f"{strategy}_{flow}": partial(train_in, flow, strategy)
    for strategy, flow in product(("ddp", "fsdp2"), FLOWS)
}
"""Scenarios of ``tests/test_fit_flows.py``."""


@scenario
def ddp(checkpoint: Path, directory: Path) -> Any:
    return train("ddp", checkpoint, directory)


class SlowOnRankOne(L.Callback):
    """Its micro-batches take longer."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        time.sleep(1.5 * trainer.global_rank)


@scenario
def ddp_with_a_slow_rank(checkpoint: Path, directory: Path) -> Any:
    return train("ddp", checkpoint, directory, callbacks=[SlowOnRankOne()], max_steps=2)


@scenario
def fsdp2(checkpoint: Path, directory: Path) -> Any:
    return train("fsdp2", checkpoint, directory)


@scenario
def fsdp2_with_a_reference(checkpoint: Path, directory: Path) -> Any:
    model = {"kl": KLPenalty(0.1), "gradient_checkpointing": True}
    return train("fsdp2", checkpoint, directory, model=model)


def trained_adapters() -> dict[str, Any]:
    """Their own reference when switched off; activations are computed again."""
    return {"lora": LoRA(rank=4, alpha=8.0), "kl": KLPenalty(0.1), "gradient_checkpointing": True}


@scenario
def fsdp2_with_adapters(checkpoint: Path, directory: Path) -> Any:
    return train("fsdp2", checkpoint, directory, model=trained_adapters())


def resume(strategy: str, checkpoint: Path, directory: Path) -> Any:
    keep = ModelCheckpoint(directory, filename="at-{step}", save_top_k=-1, every_n_train_steps=1)
    options: dict[str, Any] = {"enable_checkpointing": True, "callbacks": [keep]}
    train(strategy, checkpoint, directory, **{**options, "max_steps": 2})
    return train(strategy, checkpoint, directory, ckpt_path=directory / "at-step=2.ckpt")


@scenario
def fsdp2_resumed(checkpoint: Path, directory: Path) -> Any:
    return resume("fsdp2", checkpoint, directory)


@scenario
def fsdp2_in_parts_resumed(checkpoint: Path, directory: Path) -> Any:
    """Each rank saves its own part of weights and optimizer states."""
    return resume("fsdp2_in_parts", checkpoint, directory)


class SaveWithinAStep(L.Callback):
    """After the third of a batch's four micro-batches, in its second update."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "within.ckpt"
        self.micro_batches = 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.micro_batches += 1
        if self.micro_batches == 4 + 3:
            trainer.save_checkpoint(self.file)


@scenario
def ddp_cut_within_a_step(checkpoint: Path, directory: Path) -> Any:
    """The uncut run, and what goes on from a checkpoint of it."""
    save = SaveWithinAStep(directory)
    options: dict[str, Any] = {"data": {"updates": 2}, "max_steps": 6}
    uncut = train("ddp", checkpoint, directory / "uncut", callbacks=[save], **options)
    cut = train("ddp", checkpoint, directory / "cut", ckpt_path=save.file, **options)
    return {"uncut": uncut, "cut": cut}


@scenario
def fsdp2_without_sizes(checkpoint: Path, directory: Path) -> Any:
    try:
        train("fsdp2_without_sizes", checkpoint, directory)
    except ConfigurationError as error:
        return str(error)
    raise AssertionError("nothing was raised")


@scenario
def fsdp2_in_mixed_precision(checkpoint: Path, directory: Path) -> Any:
    return train("fsdp2", checkpoint, directory, precision="bf16-mixed")


@scenario
def long_rollout(checkpoint: Path, directory: Path) -> Any:
    """Rank 0's rollout takes longer than the ranks' process group waits for anything."""
    data = {"reward": SlowFirst(TIME_LIMIT_S + 5), "timeout_s": 120.0}
    return train("ddp", checkpoint, directory, data=data, max_steps=1)


@scenario
def skewed(checkpoint: Path, directory: Path) -> Any:
    """One long and one short trajectory; the longer one, if cut off, is left out of the loss."""
    data = {"groups": 1, "cap": 2, "max_new_tokens": 12, "truncated": "mask"}
    options = {"accumulate_grad_batches": 1, "max_steps": 6, "data": data}
    return train("fsdp2", checkpoint, directory, **options)


def poisoned(checkpoint: Path, directory: Path) -> Path:
    """A checkpoint with a weight that is not a number: of one token's embedding."""
    folder = directory / "poisoned"
    if dist.get_rank() == 0:
        model = load_model(str(checkpoint), dtype="float32", attn_implementation="sdpa")
        head = model.get_input_embeddings().weight.detach().clone()
        model.config.tie_word_embeddings = False
        model.set_output_embeddings(torch.nn.Linear(*head.T.shape, bias=False))
        with torch.no_grad():
            model.get_output_embeddings().weight.copy_(head)
            model.get_input_embeddings().weight[60] = torch.nan
        model.save_pretrained(folder)
        for file in checkpoint.glob("*token*"):
            shutil.copy(file, folder)
    dist.barrier()
    return folder


@scenario
def quarantined(checkpoint: Path, directory: Path) -> Any:
    """Whoever meets a token that spoils everything starts again, with all others."""
    data = {"behavior_logprobs": "engine", "max_quarantined": 1.0}
    return train("fsdp2", poisoned(checkpoint, directory), directory, data=data)


def fail(checkpoint: Path, directory: Path, **data: Any) -> str:
    try:
        train("fsdp2", checkpoint, directory, data={"reward": failing_reward, **data})
    except (RewardError, RolloutError) as error:
        return repr(error)
    raise AssertionError("nothing was raised")


@scenario
def failing(checkpoint: Path, directory: Path) -> Any:
    return fail(checkpoint, directory)


@scenario
def failing_in_validation(checkpoint: Path, directory: Path) -> Any:
    return fail(checkpoint, directory, evaluations={"val": Evaluation(SomePrompts(4))})


@scenario
def fsdp1_weights(checkpoint: Path, directory: Path) -> Any:
    """Lightning's FSDPStrategy asks for a GPU; what it wraps modules in does not."""
    model = load_model(str(checkpoint), dtype="float32", attn_implementation="sdpa")
    expected = {name: digest(p.detach()) for name, p in model.named_parameters()}
    policy = Policy(model, chunk_tokens=64)
    root = fsdp1(policy)
    held = sum(p.numel() for p in policy.parameters())
    gathered = {name: digest(tensor) for name, tensor in full_weights(model, root)}
    return {"expected": expected, "gathered": gathered, "held": held}


def fsdp1(policy: Policy) -> FullyShardedDataParallel:
    layer = type(policy.model.base_model.layers[0])
    return FullyShardedDataParallel(
        policy,
        auto_wrap_policy=ModuleWrapPolicy({layer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


@scenario
def split_experts(checkpoint: Path, directory: Path) -> Any:
    """Fused and renamed weights, and buffers that are saved, put together from two ranks."""
    results = {}
    for model_type in ("mixtral", "deepseek_v3"):
        saved = directory / model_type
        if dist.get_rank() == 0:  # the other would not write
            tiny_architecture(model_type, saved)
        dist.barrier()
        expected = {n: digest(t) for n, t in load_file(saved / "model.safetensors").items()}
        for kind in ("fsdp1", "fsdp2"):
            model = load_model(str(saved), dtype="float32", attn_implementation="eager")
            policy = Policy(model, chunk_tokens=64)
            root: torch.nn.Module = policy
            if kind == "fsdp1":
                root = fsdp1(policy)
            else:
                shard(policy, model, init_device_mesh("cpu", (2,)))
            weights = chain(full_weights(model, root), saved_buffers(model))
            gathered = {name: digest(tensor) for name, tensor in as_saved(model, weights)}
            results[model_type, kind] = (gathered, expected)
    return results


def main(scenarios: dict[str, Callable[[Path, Path], Any]]) -> None:
    """What the command line asks for."""
    checkpoint, directory = map(Path, sys.argv[1:3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIME_LIMIT_S))
    for name in sys.argv[3:]:
        place = directory / name
        place.mkdir(exist_ok=True)
        try:
            result = scenarios[name](checkpoint, place)
        except BaseException:  # noqa: BLE001 - told to the test
            result = traceback.format_exc()
        torch.save(result, directory / f"{name}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main({**SCENARIOS, **IN_FLOWS})
