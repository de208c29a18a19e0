"""An engine on virtual time: seeded, deterministic, able to misbehave.

The scheduler that runs on it is the one that runs on vLLM. A token is a hash of the version, the
whole prefix and the trajectory's seed (:func:`simulate_token`; greedy decoding: the seed 0), so
that a token that was lost, doubled or labelled with the wrong version is found out by computing it
again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from torch import Tensor

from copris_lightning.core.outcome import FinishReason
from copris_lightning.engines.engine import Chunk, EngineSpec, GenerationRequest
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError

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
        u = (_mix(seed, 1) + 0.5) / 2**64
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
    version: int, prefix: Sequence[int], seed: int, *, vocab_size: int, stop: int, mean: float
) -> tuple[int, float]:
    """The token that follows ``prefix`` and its log-prob: a pure function of its arguments.

    Args:
        version: of the weights.
        prefix: prompt and response so far.
        seed: the trajectory's.
        vocab_size: tokens are below it.
        stop: the stop token, drawn with probability ``1 / mean``.
        mean: mean length of the response, in tokens.
    """
    return _draw(_absorb(_mix(seed, 2), prefix), version, vocab_size, stop, mean)


def _draw(state: int, version: int, vocab_size: int, stop: int, mean: float) -> tuple[int, float]:
    value = _mix(state, version)
    logprob = -(1 + value % 4096) / 1024
    if _mix(value, 3) / 2**64 < 1 / mean:
        return stop, logprob
    token = _mix(value, 4) % max(1, vocab_size - 1)
    return (token + 1 if token >= stop else token), logprob


def _absorb(state: int, tokens: Iterable[int]) -> int:
    for token in tokens:
        state = _mix(state, token)
    return state


def _mix(a: int, b: int) -> int:
    """The finalizer of splitmix64 over two words."""
    x = (a * 0x9E3779B97F4A7C15 + b + 0x632BE59BD9B4E019) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@dataclass(slots=True)
class _Active:
    request: GenerationRequest
    state: int
    mean: float
    made: int = 0
    chunks: asyncio.Queue[Chunk | EngineError] = field(default_factory=asyncio.Queue)


class SimulatedEngine:
    """Stands in for vLLM where no model need run: schedules, tests, plans for a cluster.

    Args:
        lengths: how long responses are.
        step_time: what a decoding step takes, in virtual seconds.
        faults: how it misbehaves.
    """

    def __init__(
        self,
        lengths: LengthModel | None = None,
        step_time: StepTime | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.lengths = lengths or LengthModel()
        self.step_time = step_time or StepTime()
        self.faults = faults or Faults()
        self.tokens_made = 0
        self._version = 0
        self._spec: EngineSpec | None = None
        self._active: dict[str, _Active] = {}
        self._steps: asyncio.Task[None] | None = None
        self._dead = False

    @property
    def version(self) -> int:
        """Policy version of the pretended weights."""
        return self._version

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """A loop on virtual time."""
        return VirtualClockLoop()

    def validate(self, spec: EngineSpec) -> None:
        """Refuse what cannot be simulated.

        Raises:
            ConfigurationError: fewer than two tokens to draw from.
        """
        if spec.vocab_size < 2:
            raise ConfigurationError(f"the tokenizer knows {spec.vocab_size} tokens: at least 2")

    async def start(self, spec: EngineSpec) -> None:
        """Takes no time."""
        self.validate(spec)
        self._spec = spec
        self._active, self._steps, self._dead = {}, None, False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response, a token a step. See :class:`Engine`."""
        if self._spec is None or self._dead:
            raise EngineError("the simulated engine is not running")
        if request.request_id in self._active:
            raise EngineError(f"request id {request.request_id!r} is in use")
        seed = request.seed if not request.decoding.sampling.is_greedy else 0
        active = _Active(
            request, _absorb(_mix(seed, 2), request.token_ids), self.lengths.mean(seed)
        )
        self._active[request.request_id] = active
        if self._steps is None or self._steps.done():
            self._steps = asyncio.get_running_loop().create_task(self._run())
        try:
            while True:
                item = await active.chunks.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._active.pop(request.request_id, None)

    async def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Only the version changes. See :class:`Engine`."""
        if self._active:
            raise WeightSyncError(f"{len(self._active)} requests are in flight during a sync")
        self._version = version

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """``None``: there is no model to ask."""
        return None

    async def explain_mismatch(self, weights: Iterable[tuple[str, Tensor]]) -> str:
        """There are no weights."""
        return "the simulated engine has no weights"

    async def close(self) -> None:
        """Stop stepping."""
        self._dead = True
        if self._steps is not None:
            self._steps.cancel()
            await asyncio.wait([self._steps])

    async def _run(self) -> None:
        assert self._spec is not None
        while self._active:
            batch = list(self._active.values())[: self._spec.max_num_seqs]
            await asyncio.sleep(self.step_time(len(batch)))
            for active in batch:
                if active.request.request_id in self._active:
                    self._step(active, self._spec.vocab_size)
            if self._dead:
                return

    def _step(self, active: _Active, vocab_size: int) -> None:
        if self.tokens_made == self.faults.die_after_tokens:
            self._dead = True
            for other in self._active.values():
                other.chunks.put_nowait(EngineError("the simulated engine died, as told to"))
            return
        request = active.request
        if active.made >= request.max_new_tokens:
            return
        stops = request.decoding.stop_token_ids
        stop = stops[0] if stops else -1
        mean = active.mean if stops else math.inf
        token, logprob = _draw(active.state, self._version, vocab_size, stop, mean)
        active.state = _mix(active.state, token)
        active.made += 1
        self.tokens_made += 1
        reason: FinishReason | None = None
        if token in stops:
            reason = "stop"
        elif active.made == request.max_new_tokens:
            reason = "length"
        logprobs, nothing = ((logprob,), ()) if request.decoding.logprobs else (None, None)
        if self._happens(active, 5, self.faults.empty_chunk_rate):
            active.chunks.put_nowait(Chunk((), nothing, self._version))
        if reason and self._happens(active, 6, self.faults.late_finish_rate):
            active.chunks.put_nowait(Chunk((token,), logprobs, self._version))
            active.chunks.put_nowait(Chunk((), nothing, self._version, reason))
            active.made = request.max_new_tokens
        else:
            active.chunks.put_nowait(Chunk((token,), logprobs, self._version, reason))
            if reason:
                active.made = request.max_new_tokens

    @staticmethod
    def _happens(active: _Active, salt: int, rate: float) -> bool:
        return _mix(active.state, salt) / 2**64 < rate
