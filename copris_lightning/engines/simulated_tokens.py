"""What a simulated engine makes, how long it takes, and how it fails: pure functions of seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from copris_lightning.errors import ConfigurationError

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Long-tailed response lengths: geometric, each trajectory's mean drawn log-normally.

    Attributes:
        median: of the trajectories' mean lengths, in tokens.
        sigma: standard deviation of the log of the mean; 0 gives one geometric distribution.
    """

    median: float = 24.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.median < math.inf:
            raise ConfigurationError(f"median={self.median} must be above 0")
        if not 0 <= self.sigma < math.inf:
            raise ConfigurationError(f"sigma={self.sigma} must be at least 0")

    def mean(self, seed: int) -> float:
        """The mean length of the trajectory with this seed, in tokens."""
        u = (mix(seed, 1) + 0.5) / 2**64
        return max(1.0, self.median * math.exp(self.sigma * NormalDist().inv_cdf(u)))


@dataclass(frozen=True, slots=True)
class StepTime:
    """Virtual seconds of one decoding step with b requests: t(b) = t0 + t1 * b."""

    t0: float = 0.02
    t1: float = 0.0002

    def __post_init__(self) -> None:
        for name, value in (("t0", self.t0), ("t1", self.t1)):
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"{name}={value} must be at least 0")

    def __call__(self, batch: int) -> float:
        return self.t0 + self.t1 * batch


@dataclass(frozen=True, slots=True)
class KVCache:
    """Room for keys and values. Where it is full, who came last is put back, and has them computed
    again before it goes on.

    Attributes:
        tokens: prompts and responses that it holds.
        prefix_s: virtual seconds that a token takes whose keys and values are computed without
            making one: of a prompt, or of a response that goes on.
    """

    tokens: int
    prefix_s: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigurationError(f"tokens={self.tokens} must be at least 1")
        if not 0 <= self.prefix_s < math.inf:
            raise ConfigurationError(f"prefix_s={self.prefix_s} must be at least 0")


@dataclass(frozen=True, slots=True)
class Faults:
    """How the engine misbehaves; rates are per token, drawn from the seed.

    Attributes:
        empty_chunk_rate: an empty chunk comes before the token.
        late_finish_rate: a response's finish reason comes in an empty chunk after its last token.
        die_after_tokens: the engine dies once it has made so many tokens in all.
    """

    empty_chunk_rate: float = 0.0
    late_finish_rate: float = 0.0
    die_after_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("empty_chunk_rate", "late_finish_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name}={getattr(self, name)} must lie between 0 and 1")


def simulate_token(
    version: int,
    kv_version: int,
    prefix: Sequence[int],
    seed: int,
    *,
    vocab_size: int,
    stop: int,
    mean: float,
) -> tuple[int, float]:
    """The token that follows ``prefix`` and its log-prob: a pure function of its arguments.

    Args:
        version: of the weights.
        kv_version: of the oldest weights among those that made the keys and values of the prefix.
        prefix: prompt and response so far.
        seed: the trajectory's.
        vocab_size: tokens are below it.
        stop: the stop token, drawn with probability ``1 / mean``.
        mean: mean length of the response, in tokens.
    """
    state = absorb(mix(seed, 2), prefix)
    return draw(state, version, kv_version, vocab_size, stop, mean)


def draw(
    state: int, version: int, kv_version: int, vocab_size: int, stop: int, mean: float
) -> tuple[int, float]:
    """The token and its log-prob, from the state of a prefix."""
    value = mix(state, version)
    if kv_version != version:
        value = mix(value, kv_version)
    logprob = -(1 + value % 4096) / 1024
    if mix(value, 3) / 2**64 < 1 / mean:
        return stop, logprob
    token = mix(value, 4) % max(1, vocab_size - 1)
    return (token + 1 if token >= stop else token), logprob


def absorb(state: int, tokens: Iterable[int]) -> int:
    """The state after more of the prefix."""
    for token in tokens:
        state = mix(state, token)
    return state


def mix(a: int, b: int) -> int:
    """The finalizer of splitmix64 over two words."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
