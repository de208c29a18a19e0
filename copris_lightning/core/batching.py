"""From trajectories to padded micro-batches of near-equal cost, and back to per-token lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

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
        versions: ``[B, R]``, the policy version of each response token, 0 at padding.
        advantages: ``[B]``.
        included: ``[B]``, false for trajectories that are left out of the loss.
        mismatch: ``[B, R]``, log of trainer over engine probability, 0 at padding; ``None`` where
            only the engine's are known.
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
        """True at response tokens, ``[B, R]``."""
        return length_mask(self.response_lengths, self.behavior_logprobs.shape[1])

    @property
    def loss_mask(self) -> Tensor:
        """True at the response tokens that count, ``[B, R]``."""
        return self.response_mask & self.included[:, None]

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
        """Trained version minus the token's version, ``[B, R]``; 0 at padding."""
        return (self.policy_version - self.versions) * self.response_mask


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
        if not t.prompt_token_ids:
            raise ValueError(f"prompt {t.prompt_id!r} has no tokens")
    tokens = [[*t.prompt_token_ids, *t.response_token_ids] for t in trajectories]
    width = max(1, *(t.response_length for t in trajectories))
    behavior = [[] if source is None else t.behavior_logprobs(source) for t in trajectories]
    mismatch = proximal = None
    if source == "trainer":
        engine = _pad([t.behavior_logprobs("engine") for t in trajectories], torch.float64, width)
        mismatch = (_pad(behavior, torch.float64, width) - engine).float()
    if all(len(t.proximal_logprobs) == t.response_length for t in trajectories):
        proximal = _pad([t.proximal_logprobs for t in trajectories], torch.float32, width)
    return MicroBatch(
        input_ids=_pad(tokens, torch.long),
        prompt_lengths=torch.tensor([len(t.prompt_token_ids) for t in trajectories]),
        response_lengths=torch.tensor([t.response_length for t in trajectories]),
        behavior_logprobs=_pad(behavior, torch.float32, width),
        versions=_pad([t.versions for t in trajectories], torch.long, width),
        advantages=torch.tensor([t.advantage or 0.0 for t in trajectories], dtype=torch.float32),
        included=torch.tensor([t.excluded is None for t in trajectories]),
        mismatch=mismatch,
        proximal_logprobs=proximal,
        names=[t.name for t in trajectories],
        policy_version=policy_version,
        sampling=sampling,
        totals=totals,
        quarantine_limit=quarantine_limit,
    )


def _pad(rows: Sequence[Sequence[float]], dtype: torch.dtype, width: int | None = None) -> Tensor:
    size = max(len(row) for row in rows) if width is None else width
    padded = torch.zeros(len(rows), size, dtype=dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=dtype)
    return padded


def forward_cost(hidden_size: int) -> Callable[[int], float]:
    r"""Relative cost of one sequence of n tokens: linear layers plus attention.

    .. math:: c(n) = n + n^2 / (12\, d)

    A decoder layer of width d costs about 24 d^2 operations a token in its linear layers and
    2 n d in causal attention (Kaplan et al., arXiv 2001.08361, table 1, with causal halving).
    """
    return lambda n: n + n * n / (12 * hidden_size)


def partition(lengths: Sequence[int], parts: int, cost: Callable[[int], float]) -> list[list[int]]:
    """Split sequences into ``parts`` micro-batches whose dearest is as cheap as can be.

    Padding makes a micro-batch cost its count times the cost of its longest row, so sequences
    are sorted by length and cut into consecutive runs; among all such cuts the result has the
    smallest maximum.

    Args:
        lengths: tokens of each sequence.
        parts: number of micro-batches, over all ranks.
        cost: increasing; of one sequence of that many tokens (:func:`forward_cost`).

    Returns:
        ``parts`` non-empty lists of indices into ``lengths``, dearest rows first; every index
        occurs once.

    Raises:
        ValueError: fewer sequences than parts.
    """
    if not 1 <= parts <= len(lengths):
        raise ValueError(f"{len(lengths)} trajectories cannot fill {parts} micro-batches")
    order = _longest_first(lengths)
    costs = [cost(lengths[i]) for i in order]
    # Every possible cost of a run is (rows) x (cost of its first row): bisect between the
    # dearest single row and the whole set, until the number of parts fits.
    low, high = costs[0], len(order) * costs[0]
    if len(_cut(costs, low)) <= parts:
        high = low
    for _ in range(64):
        middle = (low + high) / 2
        if len(_cut(costs, middle)) <= parts:
            high = middle
        else:
            low = middle
    bounds = [*_cut(costs, high), len(order)]
    # Too few runs fit the limit already: splitting any further only makes them cheaper.
    while len(bounds) - 1 < parts:
        size, i = max((b - a, i) for i, (a, b) in enumerate(pairwise(bounds)))
        bounds.insert(i + 1, bounds[i] + size // 2)
    return [order[a:b] for a, b in pairwise(bounds)]


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequences into as few padded micro-batches as hold at most ``max_tokens`` each.

    Args:
        lengths: tokens of each sequence.
        max_tokens: rows times longest row, padding included; a longer sequence stands alone.

    Returns:
        lists of indices into ``lengths``; every index occurs once.
    """
    order = _longest_first(lengths)
    bounds = [*_cut([lengths[i] for i in order], max_tokens), len(order)]
    return [order[a:b] for a, b in pairwise(bounds)]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _cut(costs: Sequence[float], limit: float) -> list[int]:
    """Starts of the runs of falling costs when each takes rows while it stays within the limit."""
    starts = [0] if costs else []
    for i in range(1, len(costs)):
        if (i - starts[-1] + 1) * costs[starts[-1]] > limit:
            starts.append(i)
    return starts
