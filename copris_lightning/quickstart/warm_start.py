"""The quickstart's starting point: a tiny Qwen3 that learnt to divide from a careless teacher.

    python -m copris_lightning.quickstart.warm_start --output DIR [--seed N]

The demonstrations contain mistakes, and imitation repeats them about as often as it saw them. A
verifier tells right from wrong, so reinforcement learning has something to gain from it that more
imitation has not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import string
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from copris_lightning.quickstart import task
from copris_lightning.quickstart.task import DivisionPrompts, demonstration

CONTEXT = 512
"""Longest prompt and response together, in tokens."""

Batch = dict[str, torch.Tensor]
Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, and of the response with its end."""

_IGNORED = -100
_RECORD = "warm_start.json"
_HEAD_DIM = 32
_TAIL = 1.0
"""Of the demonstrations: long ones are less rare than in the task, since they show more."""


def warm_start(
    output: str | Path,
    *,
    seed: int = 0,
    steps: int = 2000,
    batch_tokens: int = 512,
    learning_rate: float = 3e-3,
    error_rate: float = 0.08,
    hidden_size: int = 128,
    layers: int = 3,
) -> Path:
    """Trains the quickstart's model by imitation and saves it, or reuses what is already there.

    The checkpoint appears whole or not at all: it is made beside ``output`` and then renamed.

    Args:
        output: directory of the checkpoint. A warm start with other settings in it is replaced.
        seed: of the weights and of the demonstrations.
        steps: optimizer steps.
        batch_tokens: upper bound on the tokens of a step, padding included.
        learning_rate: peak of a one-cycle schedule.
        error_rate: probability that a step of a demonstration is wrong.
        hidden_size: a multiple of 64.
        layers: number of decoder layers.

    Returns:
        ``output``, as a path.

    Raises:
        ValueError: a setting is out of range, or ``output`` holds something else than a warm start.
    """
    settings = {name: value for name, value in locals().items() if name != "output"}
    output = Path(output).absolute()
    if steps < 10:
        raise ValueError(f"steps is {steps}: set steps to 10 or more")
    if batch_tokens < CONTEXT:
        raise ValueError(f"batch_tokens is {batch_tokens}: set batch_tokens to {CONTEXT} or more")
    if learning_rate <= 0:
        raise ValueError(f"learning_rate is {learning_rate}: set learning_rate above 0")

    # The code belongs to the record: a warm start on another version of the task is no warm start.
    code = b"".join(Path(file).read_bytes() for file in (__file__, task.__file__))
    record = {**settings, "code": hashlib.sha256(code).hexdigest()[:16]}
    if (output / _RECORD).is_file():
        if json.loads((output / _RECORD).read_text()) == record:
            print(f"warm start: reusing {output}", flush=True)
            return output
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} holds something else: set output to a new directory")

    tokenizer = character_tokenizer()
    model = _untrained(tokenizer, seed, True, hidden_size, layers)
    data = _Demonstrations(tokenizer, seed, steps, batch_tokens, error_rate)
    _fit(_Imitation(model, learning_rate, steps), data, steps)
    _save(model, tokenizer, record, output)
    return output


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, Any],
    output: Path,
) -> None:
    """Put a checkpoint and its record in the place of what is there, all at once."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as staging:
        made = Path(staging, "made")
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if output.exists():
            output.rename(Path(staging, "replaced"))
        made.rename(output)
    print(f"warm start: saved {output}", flush=True)


def tiny_model(
    directory: str | Path,
    *,
    seed: int = 0,
    tied: bool = True,
    hidden_size: int = 128,
    layers: int = 3,
) -> Path:
    """Saves an untrained Qwen3 and its character tokenizer as a checkpoint in ``directory``.

    Args:
        directory: is created; a checkpoint already in it is overwritten.
        seed: of the weights. The global random state is left as it was.
        tied: whether the output layer shares the embedding's weights.
        hidden_size: a multiple of 64.
        layers: number of decoder layers.

    Returns:
        ``directory``, as a path.

    Raises:
        ValueError: ``hidden_size`` or ``layers`` is out of range.
    """
    tokenizer = character_tokenizer()
    _untrained(tokenizer, seed, tied, hidden_size, layers).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each character (printable ASCII and newline), and no tokens added.

    Text with any other character raises an error when it is encoded, rather than losing it.
    """
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    special = ["<|pad|>", "<|eos|>"]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + characters)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[1],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def _untrained(
    tokenizer: PreTrainedTokenizerFast, seed: int, tied: bool, hidden_size: int, layers: int
) -> Qwen3ForCausalLM:
    if hidden_size < 1 or hidden_size % (2 * _HEAD_DIM):
        raise ValueError(
            f"hidden_size is {hidden_size}: set hidden_size to a multiple of {2 * _HEAD_DIM}"
        )
    if layers < 1:
        raise ValueError(f"layers is {layers}: set layers to 1 or more")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // _HEAD_DIM,
        num_key_value_heads=hidden_size // (2 * _HEAD_DIM),
        head_dim=_HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        # 1/sqrt(128): at the usual 0.02, meant for wide models, learning takes three times as long.
        initializer_range=0.08,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def _fit(module: L.LightningModule, data: IterableDataset[Batch], steps: int) -> None:
    with warnings.catch_warnings():
        # Batches take a millisecond to make: workers would only compete for the cores.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_ProgressLine()],
        )
        trainer.fit(module, DataLoader(data, batch_size=None))


class _Imitation(L.LightningModule):
    """Teacher forcing; the loss counts response tokens, the end of the response included."""

    def __init__(self, model: Qwen3ForCausalLM, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.model = model.train()
        self.learning_rate = learning_rate
        self.steps = steps

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        # Padding is on the right, where a causal model does not look: no attention mask.
        logits = self.model(input_ids=batch["input_ids"][:, :-1], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(
            self.parameters(), self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class _ProgressLine(L.Callback):
    """One line every ten seconds."""

    PERIOD_S = 10.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.began = self.printed = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.monotonic()
        last = trainer.global_step == trainer.max_steps
        if last or now - self.printed >= self.PERIOD_S:
            self.printed = now
            print(
                f"warm start: step {trainer.global_step}/{trainer.max_steps}"
                f"  loss {outputs['loss'].item():.3f}  {now - self.began:.0f} s",
                flush=True,
            )


class _Demonstrations(IterableDataset[Batch]):
    """An endless stream of padded batches of demonstrations, short ones first.

    Yields ``input_ids [B, T]`` and ``labels [B, T]``, in which prompt and padding are ignored.
    The longest division grows over the first half of the training: subtraction is learnt sooner
    from small numbers. Batches are cut from a pool sorted by length, since at
    lengths as mixed as these padding would be most of the work.
    """

    POOL = 384

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        steps: int,
        batch_tokens: int,
        error_rate: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.seed = seed
        self.steps = steps
        self.batch_tokens = batch_tokens
        self.error_rate = error_rate

    def __iter__(self) -> Iterator[Batch]:
        rng = random.Random(f"warm-start/{self.seed}")
        done = 0
        while True:
            grown = min(1.0, 2 * done / self.steps)
            batches = self._pool(rng, round(2 + grown * (task.MAX_QUOTIENT - 2)))
            done += len(batches)
            yield from map(self._pad, batches)

    def _pool(self, rng: random.Random, max_quotient: int) -> list[list[Pair]]:
        pairs = []
        for prompt in DivisionPrompts(self.POOL, rng.getrandbits(64), max_quotient, _TAIL):
            question = self.tokenizer.encode(prompt.text)
            answer = self.tokenizer.encode(demonstration(prompt, rng, self.error_rate))
            pairs.append((question, [*answer, self.tokenizer.eos_token_id]))
        pairs.sort(key=lambda pair: len(pair[0] + pair[1]))
        batches: list[list[Pair]] = [[]]
        for pair in pairs:
            if (len(batches[-1]) + 1) * len(pair[0] + pair[1]) > self.batch_tokens:
                batches.append([])
            batches[-1].append(pair)
        rng.shuffle(batches)
        return batches

    def _pad(self, batch: list[Pair]) -> Batch:
        shape = (len(batch), max(len(question + answer) for question, answer in batch))
        input_ids = torch.full(shape, self.tokenizer.pad_token_id)
        labels = torch.full(shape, _IGNORED)
        for row, (question, answer) in enumerate(batch):
            input_ids[row, : len(question + answer)] = torch.tensor(question + answer)
            labels[row, len(question) : len(question + answer)] = torch.tensor(answer)
        return {"input_ids": input_ids, "labels": labels}


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    auto_cli(warm_start, as_positional=False)
