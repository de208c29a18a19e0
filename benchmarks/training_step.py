"""What a training step costs, against plain transformers on the same padded rows.

    python benchmarks/training_step.py

Both make one optimizer step on one micro-batch: forward, loss, backward, AdamW. Plain is
transformers' own cross-entropy of the response tokens; ours are the log-probs and the
importance-sampled loss. Who leaves the padding out can be faster than plain by no more than the
share of padding, which is printed.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from harness import Report, Table, by_turns, parse, parser
from models import parameters, quiet, qwen3, rows, save
from torch import Tensor
from transformers import AutoModelForCausalLM
from workload import PROMPT_TOKENS

from copris_lightning import CoprisModule
from copris_lightning.core.batching import MicroBatch, collate
from copris_lightning.core.estimator.normalization import UpdateTotals

NOT_SCORED = -100
"""The label of a token that transformers leaves out of the loss."""


def ours(checkpoint: str, batch: MicroBatch) -> Callable[[], Tensor]:
    """The loss of a micro-batch as the module computes it."""
    module = CoprisModule(checkpoint)
    module.configure_model()
    return _step(module, lambda: module.policy_loss(batch, module.token_terms(batch))[0])


def plain(checkpoint: str, batch: MicroBatch) -> Callable[[], Tensor]:
    """The loss of the same rows as transformers computes it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    mask = batch.attention_mask
    is_prompt = torch.arange(mask.shape[1]) < batch.prompt_lengths[:, None]
    labels = batch.input_ids.masked_fill((mask == 0) | is_prompt, NOT_SCORED)

    def loss() -> Tensor:
        output = model(batch.input_ids, attention_mask=mask, labels=labels, use_cache=False)
        return cast("Tensor", output.loss)

    return _step(model, loss)


def _step(model: torch.nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def seconds(step: Callable[[], Tensor]) -> float:
    """How long one takes."""
    started = time.perf_counter()
    value = step()
    took = time.perf_counter() - started
    assert value.isfinite()
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    line = parser(__doc__, rounds=7)
    line.add_argument("--rows", type=int, default=32)
    line.add_argument("--shortest", type=int, default=45)
    line.add_argument("--longest", type=int, default=141)
    line.add_argument("--hidden-size", type=int, default=256)
    line.add_argument("--layers", type=int, default=6)
    line.add_argument("--seed", type=int, default=0)
    options = parse(line, arguments, {"rows": 4, "hidden_size": 64, "layers": 1})
    quiet()

    rng = random.Random(options.seed)
    lengths = [rng.randint(options.shortest, options.longest) for _ in range(options.rows)]
    model = qwen3(options.hidden_size, options.layers)
    totals = UpdateTotals(len(lengths), sum(lengths) - PROMPT_TOKENS * len(lengths), max(lengths))
    batch = collate(rows(lengths, options.seed), source=None, totals=totals)
    report = Report("training_step", options)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save(model, folder)
        steps = {"transformers": plain(checkpoint, batch), "ours": ours(checkpoint, batch)}
        variants = {name: lambda step=step: seconds(step) for name, step in steps.items()}
        times = by_turns(variants, options.rounds, warm_up=2)
    title = f"{parameters(model) / 1e6:.1f} M parameters: seconds of a step"
    report.add(Table(title, times, ("transformers",), higher_is_better=False))
    padded = batch.input_ids.numel() / sum(lengths)
    report.add(Table("padded / real tokens", {"rows": [padded]}, higher_is_better=False))
    report.write()


if __name__ == "__main__":
    main()
