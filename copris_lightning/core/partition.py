"""Which sequences go through the model together: cuts of them by length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise


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


PASS_TOKENS = 256
"""What a forward pass costs before its first token, in tokens."""


def cut_by_length(
    lengths: Sequence[int], max_tokens: int, pass_tokens: int = PASS_TOKENS
) -> list[list[int]]:
    """Split sequences into the padded forward passes that cost least together.

    A pass costs its rows times its longest row, padding included, plus ``pass_tokens``. The best
    passes are consecutive runs of the sequences sorted by length, and among all such cuts this is
    the cheapest. So few sequences of like lengths stay together, and where lengths differ much,
    no cut in two would save more padding than a pass costs.

    Args:
        lengths: tokens of each sequence, > 0.
        max_tokens: rows times longest row of a pass; a longer sequence stands alone.
        pass_tokens: the fixed cost of a pass.

    Returns:
        lists of indices into ``lengths``, longest first; every index occurs once.
    """
    order = _longest_first(lengths)
    # cheapest[i]: of the passes over the first i sequences; starts[i]: where the last one begins.
    cheapest, starts = [0.0], [0]
    for end in range(1, len(order) + 1):
        best, start = math.inf, end - 1
        for first in range(end - 1, -1, -1):
            tokens = (end - first) * lengths[order[first]]
            if tokens > max_tokens and first < end - 1:
                break  # and so would be every run that begins earlier: its rows are longer
            if cheapest[first] + tokens < best:
                best, start = cheapest[first] + tokens, first
        cheapest.append(best + pass_tokens)
        starts.append(start)
    runs, end = [], len(order)
    while end:
        runs.append(order[starts[end] : end])
        end = starts[end]
    return runs[::-1]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def _cut(costs: Sequence[float], limit: float) -> list[int]:
    """Starts of the runs of falling costs when each takes rows while it stays within the limit."""
    starts = [0] if costs else []
    for i in range(1, len(costs)):
        if (i - starts[-1] + 1) * costs[starts[-1]] > limit:
            starts.append(i)
    return starts
