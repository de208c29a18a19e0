"""One run of a copris config in TRL's GRPOTrainer with colocated vLLM, on a CPU.

    .venv-trl/bin/python benchmarks/trl_peer.py --output run.csv --config configs/quickstart.yaml

All is the config's, read by copris' own parser: the model, the prompts in the same order, reward,
batch, sampling, response limit, optimizer, loss and number of batches. Written are the columns of
`copris fit` that end_to_end.py reads. ``make bench-trl`` makes the environment.

TRL 1.16 does not train on vLLM's CPU build as it is. Two things are replaced, here and nowhere
else:

1. :func:`start_as_configured`: vLLM boots with the config's `engine_args`. TRL has no setting for
   them: left alone vLLM computes a float32 model in bfloat16, and compiles it when it boots.
2. :func:`sync_by_reload`: TRL loads new weights into vLLM's modules one by one. The CPU build has
   packed them for its kernels and thrown the originals away, so that there is nothing to load into.
   vLLM's own reload unpacks and packs again, but for a head that is tied to the embedding.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from transformers import TrainerCallback, set_seed

from copris_lightning import ClippedPolicyLoss, CoprisModule
from copris_lightning.cli import CoprisCLI
from copris_lightning.core.estimator.advantage import dr_grpo, grpo
from copris_lightning.core.estimator.ratios import TokenRatio
from copris_lightning.datamodules.prompts.inspection import usable_prompts
from copris_lightning.datamodules.prompts.stream import PromptEncoder, PromptSource, PromptStream
from copris_lightning.datamodules.settings import RolloutSettings
from copris_lightning.parsing import CoprisParser
from copris_lightning.policy.pretrained import (
    load_config,
    load_model,
    load_tokenizer,
    stop_token_ids,
)
from copris_lightning.rollout.decoding import ResponseDecoder

LOSSES = {
    "token_mean": "dapo",
    "sequence_mean_token_mean": "grpo",
    "constant": "dr_grpo",
}
"""TRL's names of normalizations."""
ADVANTAGES = {grpo: "group", dr_grpo: "none"}


# ---------------------------------------------------------------- what is replaced of TRL and vLLM


def start_as_configured(engine_args: Mapping[str, Any]) -> None:
    """Have TRL boot vLLM with a config's arguments besides its own."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = partial(vllm_generation.LLM, **engine_args)


def sync_by_reload() -> None:
    """Have TRL give vLLM its weights by vLLM's own reload."""
    from trl.generation.vllm_generation import VLLMGeneration

    def sync_weights(self: Any) -> None:
        worker = self.llm.llm_engine.model_executor.driver_worker
        worker.reload_weights(weights_iterator=self._iter_named_params())
        head = worker.model_runner.get_model().lm_head
        head.quant_method.process_weights_after_loading(head)
        self.llm.reset_prefix_cache()

    VLLMGeneration.sync_weights = sync_weights


# ---------------------------------------------------------------- what the config says, for TRL


def read_config(arguments: Sequence[str]) -> CoprisCLI:
    """What `copris fit` would run, made of its arguments."""
    return CoprisCLI(
        CoprisModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=CoprisParser,
        save_config_callback=None,
        auto_configure_optimizers=False,
        run=False,
        args=list(arguments),
    )


def grpo_arguments(cli: CoprisCLI, passes: int) -> dict[str, Any]:
    """TRL's names of what a config says.

    Args:
        cli: the config.
        passes: forward passes that a batch is cut into.

    Raises:
        ValueError: names what TRL has not, or not in this form.
    """
    module, settings, trainer = cli.model, cli.datamodule.settings, cli.trainer
    loss, batch, sampling = module.estimator.loss, settings.batch, settings.task.sampling
    refuse_others(module, settings, trainer)
    return {
        "seed": settings.seed,
        "max_steps": trainer.max_steps,
        "per_device_train_batch_size": batch.groups * batch.group_size // passes,
        "gradient_accumulation_steps": passes,
        "num_generations": batch.group_size,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "mask_truncated_completions": settings.credit.truncated == "mask",
        "epsilon": loss.clip_low,
        "epsilon_high": loss.clip_high,
        "delta": loss.dual_clip,
        "loss_type": LOSSES[module.estimator.normalization],
        "scale_rewards": ADVANTAGES[settings.credit.advantage],
        "max_grad_norm": trainer.gradient_clip_val or 0.0,
        "bf16": module.precision.dtype == "bfloat16",
        "gradient_checkpointing": module.memory.gradient_checkpointing,
        "vllm_max_model_length": settings.max_sequence_tokens,
    }


def refuse_others(module: Any, settings: RolloutSettings, trainer: Any) -> None:
    """Refuse a config of which TRL would train something else.

    Raises:
        ValueError: names what.
    """
    estimator, task, credit = module.estimator, settings.task, settings.credit
    same = {
        "model.lora": module.lora is None,
        "model.lr_scheduler": module.lr_scheduler is None,
        "model.estimator.loss": isinstance(estimator.loss, ClippedPolicyLoss),
        "model.estimator.ratio": type(estimator.ratio) is TokenRatio,
        "model.estimator.corrections": not estimator.corrections,
        "model.estimator.kl": estimator.kl is None,
        "model.estimator.entropy_coefficient": not estimator.entropy_coefficient,
        "model.estimator.normalization": estimator.normalization in LOSSES,
        "data.task.sampling.stop": not task.sampling.stop and not task.sampling.stop_token_ids,
        "data.batch.updates": settings.batch.updates == 1,
        "data.credit.advantage": credit.advantage in ADVANTAGES,
        "data.credit.overlong_cushion": not credit.overlong_cushion,
        "data.credit.drop_zero_variance": not credit.drop_zero_variance,
        "data.evaluations": all(e.sampling is None for e in settings.evaluations.values()),
        "trainer.devices": trainer.world_size == 1,
    }
    for name, is_same in same.items():
        if not is_same:
            raise ValueError(f"{name}: this comparison does not know how TRL does that")


class TextTask:
    """Prompts, and what responses to them are worth.

    Args:
        model: path of the checkpoint.
        settings: of the rollout.
    """

    def __init__(self, model: str, settings: RolloutSettings) -> None:
        task = self._task = settings.task
        self.tokenizer = load_tokenizer(model)
        ends = stop_token_ids(model, load_config(model), self.tokenizer)
        special = task.template.special_tokens
        self._decode = ResponseDecoder(self.tokenizer, ends, special_tokens=special)
        self.training = self.stream(task.prompts, settings.seed)

    def stream(self, prompts: PromptSource, seed: int | None) -> PromptStream:
        """Encoded prompts in the order in which `copris fit` asks for them."""
        task = self._task
        encode = PromptEncoder(
            self.tokenizer,
            max_prompt_tokens=task.max_prompt_tokens,
            key="task.prompts",
            template=task.template,
        )
        indices = usable_prompts(prompts, encode, skip_long=task.skip_long_prompts)
        return PromptStream(prompts, encode, seed=seed, indices=indices)

    def rewards(self, responses: Sequence[Sequence[int]], prompts: Sequence[Any]) -> list[float]:
        """Of responses as token ids, by the config's reward."""
        reward = self._task.scoring.reward
        return [
            float(reward(self._decode(tokens), prompt))
            for tokens, prompt in zip(responses, prompts, strict=True)
        ]

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The first training prompts, as TRL wants them."""
        queued = [self.training.next() for _ in range(count)]
        return [{"prompt": q.prompt.text, "index": q.index} for q in queued if q is not None]


# ---------------------------------------------------------------- the run


class Recorder(TrainerCallback):
    """Takes the time of each batch, and evaluates between some of them, on no time.

    Args:
        task: what responses are worth.
        settings: with the evaluations.
        every: batches between evaluations; 0 for none.
    """

    def __init__(self, task: TextTask, settings: RolloutSettings, every: int) -> None:
        self.rows: list[dict[str, float]] = []
        self.peer: Any = None
        self._task = task
        self._every = every
        self._evaluations = {
            name: (list(task.stream(evaluation.prompts, None)), evaluation.samples)
            for name, evaluation in settings.evaluations.items()
        }
        self._batch: tuple[int, float] = (0, 0.0)
        self._since = 0.0

    def reward(self, completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        """What TRL calls for the reward of a batch."""
        prompts = [self._task.training.prompt(i) for i in index]
        rewards = self._task.rewards(completion_ids, prompts)
        self._batch = sum(map(len, completion_ids)), sum(rewards) / len(rewards)
        return rewards

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first batch begins."""
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A batch ends, and the next begins."""
        seconds = time.perf_counter() - self._since
        tokens, reward = self._batch
        row = {"time/cycle_s": seconds, "train/tokens_per_s": tokens / seconds}
        self.rows.append({**row, "train/reward": reward})
        if self._every and len(self.rows) % self._every == 0:
            self.rows[-1] |= {f"val/{n}/avg_at_k": self._evaluate(n) for n in self._evaluations}
        print(self.rows[-1], flush=True)
        self._since = time.perf_counter()

    def _evaluate(self, name: str) -> float:
        queued, samples = self._evaluations[name]
        asked = [q for q in queued for _ in range(samples)]
        generation = self.peer.vllm_generation
        generation.sync_weights()
        _, responses, _, _ = generation.generate([list(q.token_ids) for q in asked], None, samples)
        rewards = self._task.rewards(responses, [q.prompt for q in asked])
        return sum(rewards) / len(rewards)

    def write(self, file: Path) -> None:
        """All rows as CSV."""
        columns = dict.fromkeys(name for row in self.rows for name in row)
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, list(columns))
            writer.writeheader()
            writer.writerows(self.rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write what each batch took and gained."""
    line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    line.add_argument("--output", type=Path, required=True, help="the CSV file")
    line.add_argument("--every", type=int, default=0, help="batches between evaluations")
    line.add_argument("--passes", type=int, default=1, help="forward passes of a batch")
    line.add_argument("--threads", type=int, default=torch.get_num_threads())
    options, config = line.parse_known_args(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Or vLLM, being in this process, sets one, for training as well.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    recorder = train(read_config(config), options.passes, options.every)
    recorder.write(options.output)


def train(cli: CoprisCLI, passes: int, every: int) -> Recorder:
    """Train in TRL what a config says."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    module, settings = cli.model, cli.datamodule.settings
    chosen = grpo_arguments(cli, passes)
    task = TextTask(module.model, settings)
    model = load_model(
        module.model,
        dtype=module.precision.dtype,
        attn_implementation=module.precision.attn_implementation,
    )
    recorder = Recorder(task, settings, every)
    rows = task.rows(cli.trainer.max_steps * settings.batch.groups)
    start_as_configured(getattr(cli.datamodule.engine, "engine_args", {}))
    sync_by_reload()
    with tempfile.TemporaryDirectory() as folder:
        peer = recorder.peer = GRPOTrainer(
            model,
            reward_funcs=recorder.reward,
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                use_vllm=True,
                vllm_mode="colocate",
                lr_scheduler_type="constant",
                shuffle_dataset=False,  # they are in the config's order
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **chosen,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=task.tokenizer,
            optimizers=(module.optimizer(model.parameters()), None),
            callbacks=[recorder],
        )
        set_seed(settings.seed)  # vLLM, being in this process, has set its own
        peer.train()
    return recorder


if __name__ == "__main__":
    main()
