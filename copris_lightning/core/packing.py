"""Which sequences go through the model together where none is padded: bins of tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Deal sequences to ``parts`` bins of near-equal cost.

    The dearest goes first, each to the bin that is cheapest so far (longest processing time first):
    the dearest bin costs at most 4/3 of what it would in the best of all deals (Graham, 1969).

    Args:
        costs: of each sequence.
        parts: number of bins.

    Returns:
        ``parts`` non-empty lists of indices into ``costs``, the dearest bin first and its dearest
        sequence first; every index occurs once.

    Raises:
        ValueError: fewer sequences than parts.
    """
    if not 1 <= parts <= len(costs):
        raise ValueError(f"{len(costs)} trajectories cannot fill {parts} micro-batches")
    bins: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, 0, i) for i in range(parts)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, size, cheapest = heap[0]
        bins[cheapest].append(index)
        heapq.heapreplace(heap, (cost + costs[index], size + 1, cheapest))
    return [bins[i] for _, _, i in sorted(heap, key=lambda entry: (-entry[0], entry[2]))]


def pack(lengths: Sequence[int], max_tokens: int, ranks: int = 1) -> list[list[int]]:
    """Deal sequences to few forward passes of at most ``max_tokens`` tokens, and of like size.

    Args:
        lengths: tokens of each sequence, > 0.
        max_tokens: of a pass; a longer sequence stands alone.
        ranks: among which the passes go round: as many for each, as far as there are sequences.

    Returns:
        lists of indices into ``lengths``, the longest pass first; every index occurs once.
    """
    # No pass holds more tokens than that, nor two sequences of more than half of them.
    tokens = sum(min(n, max_tokens) for n in lengths)
    passes = max(-(-tokens // max_tokens), sum(2 * n > max_tokens for n in lengths))
    for parts in range(-(-passes // ranks) * ranks, len(lengths), ranks):
        bins = balance(lengths, parts)
        if all(len(bin_) == 1 or sum(lengths[i] for i in bin_) <= max_tokens for bin_ in bins):
            return bins
    return balance(lengths, len(lengths)) if lengths else []
