"""Evaluation rollouts: every prompt once, on the training engine, leaving training undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.evaluation import EvaluationBatch
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.datamodules.prompts.stream import PromptStream
from copris_lightning.datamodules.ranks import Exchange
from copris_lightning.datamodules.settings import RolloutSettings
from copris_lightning.engines.engine import Decoding
from copris_lightning.rollout.session import RolloutSession


def evaluation_batches(prompts: int, settings: RolloutSettings) -> int:
    """How many batches :func:`evaluate` yields."""
    return -(-prompts // settings.batch_groups)


def evaluate(
    session: RolloutSession | None,
    stream: PromptStream,
    settings: RolloutSettings,
    stop_token_ids: tuple[int, ...],
    exchange: Exchange,
) -> Iterator[EvaluationBatch]:
    """Sample k responses to every prompt, ``batch_groups`` prompts at a time.

    It has a buffer of its own on the engine that it shares with training, under one cap. What is
    unfinished after one batch is carried over to the next, under the same weights.
    """
    scheduler = None
    if session is not None:
        stream.load_state_dict({"taken": 0})
        scheduler = session.new_scheduler(
            CarryOverBuffer(
                cap=settings.cap,
                group_size=settings.val_samples,
                batch_groups=settings.batch_groups,
                max_new_tokens=settings.evaluation_tokens,
                stop_token_ids=stop_token_ids,
            ),
            stream,
            decoding=Decoding(
                temperature=settings.val_temperature,
                top_p=settings.evaluation.top_p,
                top_k=settings.evaluation.top_k,
                logprobs=False,  # nothing is trained on them
            ),
            seed=settings.seed,
            name="evaluation",
            observer=lambda event: None,
        )
    try:
        for start in range(0, len(stream), settings.batch_groups):
            batch: Any = None
            with exchange.leading():
                if session is not None and scheduler is not None:
                    scheduler.buffer.batch_groups = min(settings.batch_groups, len(stream) - start)
                    groups, _ = session.call(scheduler.take(), watch=True)
                    batch = _batch(session, groups)
            yield exchange.broadcast(batch)
    finally:  # also where Lightning asks for some of the batches only
        if session is not None and scheduler is not None and session.is_open:
            session.close_scheduler(scheduler)


def _batch(session: RolloutSession, groups: list[PromptGroup]) -> EvaluationBatch:
    return EvaluationBatch(
        # Where the reward gave no verdict there was no success.
        rewards=torch.tensor([group.rewards for group in groups]).nan_to_num(0.0, 0.0, 0.0),
        response_lengths=torch.tensor(
            [[t.response_length for t in group.trajectories] for group in groups]
        ),
        records=[session.record(t) for group in groups for t in group.trajectories],
    )
