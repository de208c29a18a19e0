"""From trajectories to padded micro-batches: how they are cut, and the one place where their
columns become tensors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from copris_lightning.core.columns import Source
from copris_lightning.core.estimator.normalization import UpdateTotals
from copris_lightning.core.sampling import Sampling
from copris_lightning.core.trajectory import LogprobSource, Trajectory

NO_TOTALS = UpdateTotals(trajectories=0, tokens=0, max_new_tokens=1)
"""Of a micro-batch that is not trained on."""


@dataclass(slots=True)
class MicroBatch:
    """Trajectories of one forward pass, right-padded. Masks come from lengths, never token ids.

    ``B`` trajectories, ``T`` the longest prompt plus response, ``R`` the longest response, in
    tokens.

    Attributes:
        input_ids: ``[B, T]``, prompt then response.
        prompt_lengths: ``[B]``.
        response_lengths: ``[B]``.
        behavior_logprobs: ``[B, R]``, natural log, 0 at padding.
        versions: ``[B, R]``, the policy version of each response token, 0 where none wrote it.
        written: ``[B, R]``, true at tokens that a policy wrote; false at observations and padding.
        advantages: ``[B]``.
        included: ``[B]``, false for trajectories that are left out of the loss.
        mismatch: ``[B, R]``, log of trainer over engine probability, 0 at padding; ``None`` where
            not both are known.
        proximal_logprobs: ``[B, R]``, 0 at padding; ``None`` unless asked for.
        names: ``[B]``, what to call each trajectory in messages.
        policy_version: the version being trained.
        sampling: how the tokens were drawn.
        totals: of the whole optimizer step, over all ranks.
        quarantine_limit: trajectories of the batch that may turn out not finite on a rank while
            it is trained on.
        is_last: whether this is the last micro-batch of the batch on this rank.
        metrics: the batch's figures to log, present where ``is_last``.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    behavior_logprobs: Tensor
    versions: Tensor
    written: Tensor
    advantages: Tensor
    included: Tensor
    mismatch: Tensor | None = None
    proximal_logprobs: Tensor | None = None
    names: list[str] = field(default_factory=list)
    policy_version: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    totals: UpdateTotals = NO_TOTALS
    quarantine_limit: int = 0
    is_last: bool = False
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor:
        """Prompt plus response, ``[B]``."""
        return self.prompt_lengths + self.response_lengths

    @property
    def attention_mask(self) -> Tensor:
        """1 at tokens, 0 at padding, ``[B, T]``."""
        return length_mask(self.lengths, self.input_ids.shape[1]).long()

    @property
    def response_mask(self) -> Tensor:
        """True at response tokens, observations included, ``[B, R]``."""
        return length_mask(self.response_lengths, self.behavior_logprobs.shape[1])

    @property
    def loss_mask(self) -> Tensor:
        """True at the response tokens that count, ``[B, R]``."""
        return self.written & self.included[:, None]

    @property
    def written_lengths(self) -> Tensor:
        """Response tokens that a policy wrote, ``[B]``."""
        return self.written.sum(dim=1)

    def to(self, device: Any, **options: Any) -> MicroBatch:
        """On another device; the options are those of :meth:`torch.Tensor.to`.

        Lightning calls this where there is such a method, and else copies each field, settings
        among them.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, **options)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def rows(self, keep: Tensor) -> MicroBatch:
        """Only some of the trajectories.

        Args:
            keep: ``[B]``, bool.
        """
        changed: dict[str, Any] = {
            f.name: getattr(self, f.name)[keep]
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        names = [name for name, kept in zip(self.names, keep.tolist(), strict=True) if kept]
        return replace(self, **changed, names=names)

    def placeholder(self) -> MicroBatch:
        """One short trajectory that does not count, where a rank has nothing to compute on but
        has to take part."""
        device = self.input_ids.device
        one, none = torch.ones(1, dtype=torch.long, device=device), torch.zeros(1, 1, device=device)
        return replace(
            self,
            input_ids=none.long().expand(1, 2),
            prompt_lengths=one,
            response_lengths=one,
            behavior_logprobs=none,
            versions=none.long(),
            written=none.bool(),
            advantages=none[0],
            included=one == 0,
            mismatch=None if self.mismatch is None else none,
            proximal_logprobs=None if self.proximal_logprobs is None else none,
            names=[""],
        )

    @property
    def response_positions(self) -> Tensor:
        """Where in ``input_ids`` each response token stands, ``[B, R]``; clamped at padding."""
        offsets = torch.arange(self.behavior_logprobs.shape[1], device=self.input_ids.device)
        positions = self.prompt_lengths[:, None] + offsets
        return positions.clamp(max=self.input_ids.shape[1] - 1)

    @property
    def lags(self) -> Tensor:
        """Trained version minus the token's version, ``[B, R]``; 0 where no policy wrote it."""
        return (self.policy_version - self.versions) * self.written


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True where the position is below the length: ``[B]`` to ``[B, size]``."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def collate(
    trajectories: Sequence[Trajectory],
    *,
    source: LogprobSource | None,
    policy_version: int = 0,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    totals: UpdateTotals = NO_TOTALS,
    quarantine_limit: int = 0,
) -> MicroBatch:
    """Pad trajectories into a :class:`MicroBatch`.

    Args:
        trajectories: at least one, each with at least one prompt token.
        source: which log-probs are the behaviour's; ``None`` leaves zeros (for scoring).
        policy_version: the version being trained.
        sampling: how the tokens were drawn.
        totals: of the whole optimizer step.
        quarantine_limit: see :class:`MicroBatch`.

    Raises:
        ValueError: no trajectory, or an empty prompt.
    """
    if not trajectories:
        raise ValueError("a micro-batch needs at least one trajectory")
    for t in trajectories:
        if not t.prompt:
            raise ValueError(f"prompt {t.prompt_id!r} has no tokens")
    prompts = torch.tensor([len(t.prompt) for t in trajectories])
    responses = torch.tensor([t.response_length for t in trajectories])
    mask = length_mask(responses, max(1, int(responses.max())))
    behavior = torch.zeros(mask.shape) if source is None else _logprobs(trajectories, source, mask)
    mismatch = proximal = None
    if source == "trainer" and not any(t.missing("engine") for t in trajectories):
        mismatch = behavior - _logprobs(trajectories, "engine", mask)
    if not any(t.missing("proximal") for t in trajectories):
        proximal = _logprobs(trajectories, "proximal", mask)
    lengths = prompts + responses
    sequences = length_mask(lengths, int(lengths.max()))
    versions, written = _labels(trajectories, mask)
    return MicroBatch(
        input_ids=_padded([t.sequence for t in trajectories], torch.int32, sequences).long(),
        prompt_lengths=prompts,
        response_lengths=responses,
        behavior_logprobs=behavior,
        versions=versions,
        written=written,
        advantages=torch.tensor([t.credit.advantage if t.credit else 0.0 for t in trajectories]),
        included=torch.tensor([t.excluded is None for t in trajectories]),
        mismatch=mismatch,
        proximal_logprobs=proximal,
        names=[t.name for t in trajectories],
        policy_version=policy_version,
        sampling=sampling,
        totals=totals,
        quarantine_limit=quarantine_limit,
    )


def _logprobs(trajectories: Sequence[Trajectory], source: Source, mask: Tensor) -> Tensor:
    return _padded([t.column(source) for t in trajectories], torch.float32, mask)


def _labels(trajectories: Sequence[Trajectory], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens' versions (0 where none wrote them), and whether one did: ``[B, R]``."""
    segments = [segment for t in trajectories for segment in t.segments]
    lengths = torch.tensor([s.length for s in segments], dtype=torch.long)
    versions = torch.tensor([s.version or 0 for s in segments], dtype=torch.long)
    written = torch.tensor([s.version is not None for s in segments], dtype=torch.bool)
    return (
        _scattered(versions.repeat_interleave(lengths), mask),
        _scattered(written.repeat_interleave(lengths), mask),
    )


def _padded(columns: Sequence[array[Any]], dtype: torch.dtype, mask: Tensor) -> Tensor:
    """One column per row, where the mask is true; 0 elsewhere."""
    flat = array(columns[0].typecode)
    for column in columns:
        flat.extend(column)
    values = torch.frombuffer(flat, dtype=dtype) if flat else torch.empty(0, dtype=dtype)
    return _scattered(values, mask)


def _scattered(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
