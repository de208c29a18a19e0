"""Evaluation rollouts: every prompt once, on the training engine, leaving training undisturbed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.evaluation import EvaluationBatch
from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.datamodules.preparation import Preparation
from copris_lightning.datamodules.ranks import Ranks
from copris_lightning.datamodules.settings import Evaluation
from copris_lightning.engines.engine import Decoding
from copris_lightning.rollout.scheduler import RolloutScheduler
from copris_lightning.rollout.session import RolloutSession


def evaluation_batches(run: Preparation, name: str) -> int:
    """How many batches :func:`evaluate` yields."""
    return -(-len(run.evaluations[name]) // run.settings.batch.groups)


def evaluate(
    session: RolloutSession | None, run: Preparation, name: str, ranks: Ranks
) -> Iterator[EvaluationBatch]:
    """Sample k responses to every prompt of an evaluation, a batch's worth of prompts at a time.

    It has a buffer of its own on the engine that it shares with training, under one cap. What is
    unfinished after one batch is carried over to the next, under the same weights.
    """
    stream, size = run.evaluations[name], run.settings.batch.groups
    evaluation = run.settings.evaluations[name]
    scheduler = None if session is None else _scheduler(session, run, name)

    def collect(start: int) -> EvaluationBatch:
        assert session is not None
        assert scheduler is not None
        scheduler.buffer.batch_groups = min(size, len(stream) - start)
        groups, _ = session.call(scheduler.take(), watch=True)
        return _batch(session, groups, name, evaluation)

    try:
        for start in range(0, len(stream), size):
            yield ranks.share(partial(collect, start))
    finally:  # also where Lightning asks for some of the batches only
        if session is not None and scheduler is not None and session.is_open:
            session.close_scheduler(scheduler)


def _scheduler(session: RolloutSession, run: Preparation, name: str) -> RolloutScheduler:
    settings, stream = run.settings, run.evaluations[name]
    sampling = settings.sampling(name)
    stream.load_state_dict({"taken": 0})
    return session.new_scheduler(
        CarryOverBuffer(
            limit=settings.flow.bounds.most,
            group_size=settings.evaluations[name].samples,
            batch_groups=settings.batch.groups,
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=run.stop_token_ids(sampling),
        ),
        stream,
        decoding=Decoding(sampling, logprobs=False),  # nothing is trained on them
        seed=settings.seed,
        name=f"evaluation-{name}",
        observer=lambda event: None,
        is_alone=True,
    )


def _batch(
    session: RolloutSession, groups: list[PromptGroup], name: str, evaluation: Evaluation
) -> EvaluationBatch:
    return EvaluationBatch(
        # Where the reward gave no number there was no success.
        rewards=torch.tensor([[v.reward or 0.0 for v in group.verdicts] for group in groups]),
        response_lengths=torch.tensor(
            [[t.response_length for t in group.trajectories] for group in groups]
        ),
        name=name,
        pass_threshold=evaluation.pass_threshold,
        records=[session.record(t) for group in groups for t in group.trajectories],
    )
