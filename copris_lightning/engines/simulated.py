"""An engine on virtual time: seeded, deterministic, able to misbehave.

The scheduler that runs on it is the one that runs on vLLM. A token is a hash of the version, the
version of the keys and values that it attends to, the whole prefix and the trajectory's seed
(:func:`simulate_token`; greedy decoding: the seed 0), so that a token that was lost, doubled or
labelled with the wrong version is found out by computing it again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from copris_lightning.core.cap import Load
from copris_lightning.core.segments import Span
from copris_lightning.engines.engine import Chunk, Ending, EngineSpec, GenerationRequest
from copris_lightning.engines.simulated_slots import Slots
from copris_lightning.engines.simulated_tokens import (
    Faults,
    KVCache,
    LengthModel,
    StepTime,
    absorb,
    draw,
    mix,
)
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.errors import ConfigurationError, EngineError, WeightSyncError
from copris_lightning.weights.transport import Run, Transport, Weights


@dataclass(slots=True)
class _Active:
    """A request that is being generated, or waits for its turn.

    Attributes:
        state: the hash of its prefix.
        mean: mean length of its response, in tokens.
        kv_version: of its keys and values; ``None`` while it has none.
        made: tokens made so far.
        unread: tokens and log-probs that no chunk has brought yet.
        unread_version: of the first of them.
        spans: ``[length, version, kv_version]`` over all tokens made.
        ended: whether its last chunk was put; it has its slot until that is read.
        chunks: what its stream reads.
    """

    request: GenerationRequest
    state: int
    mean: float
    kv_version: int | None = None
    made: int = 0
    unread: list[tuple[int, float]] = field(default_factory=list)
    unread_version: int = 0
    spans: list[list[int]] = field(default_factory=list)
    ended: bool = False
    chunks: asyncio.Queue[Chunk | EngineError] = field(default_factory=asyncio.Queue)

    @property
    def length(self) -> int:
        """Its prompt and response so far, in tokens."""
        return len(self.request.token_ids) + self.made

    def add(self, token: int, logprob: float, version: int, kv_version: int) -> None:
        """A token was made."""
        if not self.unread:
            self.unread_version = version
        self.unread.append((token, logprob))
        self.state = mix(self.state, token)
        self.made += 1
        if self.spans and self.spans[-1][1:] == [version, kv_version]:
            self.spans[-1][0] += 1
        else:
            self.spans.append([1, version, kv_version])

    def hand_over(self, version: int, ending: Ending | None = None) -> None:
        """Put what is unread into a chunk, which may be empty and of ``version`` then."""
        version = self.unread_version if self.unread else version
        tokens = tuple(token for token, _ in self.unread)
        logprobs = tuple(value for _, value in self.unread)
        spans = tuple(Span(*span) for span in self.spans) if ending else ()
        self.unread.clear()
        self.ended = ending is not None
        asked = logprobs if self.request.decoding.logprobs else None
        self.chunks.put_nowait(Chunk(tokens, asked, version, ending, spans))


class SimulatedEngine:
    """Stands in for vLLM where no model need run: schedules, tests, plans for a cluster.

    Args:
        lengths: how long responses are.
        step_time: what a decoding step takes, in virtual seconds.
        faults: how it misbehaves.
        stream_interval: tokens to a chunk; a stream's first chunks, its last and what a hold ends
            may have fewer.
        training_s: virtual seconds that the trainer takes for a batch.
        kv_cache: what there is room for; by default for all that is in flight.
    """

    def __init__(
        self,
        lengths: LengthModel | None = None,
        step_time: StepTime | None = None,
        faults: Faults | None = None,
        stream_interval: int = 1,
        training_s: float = 0.0,
        kv_cache: KVCache | None = None,
    ) -> None:
        if not 0 <= training_s < math.inf:
            raise ConfigurationError(f"training_s={training_s} must be a number from 0 on")
        if stream_interval < 1:
            raise ConfigurationError(f"stream_interval={stream_interval} must be at least 1")
        self.lengths = lengths or LengthModel()
        self.step_time = step_time or StepTime()
        self.faults = faults or Faults()
        self.stream_interval = stream_interval
        self.training_s = training_s
        self.tokens_made = 0
        self.is_held = True
        self._version = 0
        self._spec: EngineSpec | None = None
        self._slots = Slots(1, kv_cache)
        self._active: dict[str, _Active] = {}
        self._steps: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """Policy version of the pretended weights."""
        return self._version

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """A loop on virtual time."""
        return VirtualClockLoop(self.training_s)

    def validate(self, spec: EngineSpec) -> None:
        """Refuse what cannot be simulated.

        Raises:
            ConfigurationError: fewer than two tokens to draw from, or a cap that follows the load
                of an engine that has none.
        """
        if spec.vocab_size < 2:
            raise ConfigurationError(f"the tokenizer knows {spec.vocab_size} tokens: at least 2")
        if self._slots.cache is None and not spec.cap.is_fixed:
            raise ConfigurationError(
                f"flow.cap={spec.cap} follows how full the KV cache is, and this engine has room "
                "for all: set engine.kv_cache, or flow.cap to a number"
            )

    async def start(self, spec: EngineSpec) -> None:
        """Takes no time."""
        self.validate(spec)
        self._spec = spec
        self._slots = Slots(spec.max_num_seqs, self._slots.cache)
        self._active, self._steps = {}, None
        self.is_held, self._version = True, 0

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Stream one response, a token a step. See :class:`Engine`."""
        self._check_running()
        name = request.request_id
        if name in self._active:
            raise EngineError(f"request id {name!r} is in use")
        seed = 0 if request.decoding.sampling.is_greedy else request.seed
        state = absorb(mix(seed, 2), request.token_ids)
        active = self._active[name] = _Active(request, state, self.lengths.mean(seed))
        self._go_on()
        try:
            while True:
                item = await active.chunks.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.ending is not None:
                    return
        finally:
            if self._active.get(name) is active:
                del self._active[name]

    async def hold(self, *, keep: bool = False) -> None:
        """Stop within a step, whose tokens are not made. See :class:`Engine`."""
        self._check_running()
        self.is_held = True
        await self._stop_stepping()
        if not keep:
            for active in self._going():
                active.hand_over(self._version, "held")
            self._active.clear()

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        """Takes no time. See :class:`Engine`.

        Raises:
            EngineError: it is not held, or the version falls.
        """
        self._check_running()
        if not self.is_held or version < self._version:
            raise EngineError(
                f"release of version {version}: it must be held, and at version {self._version}"
            )
        self._version, self.is_held = version, False
        if clear_kv:
            for active in self._going():
                active.kv_version = None
        self._go_on()

    def load(self) -> Load | None:
        """Requests in slots and beyond them."""
        return self._slots.load(len(self._going()))

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]] | None:
        """``None``: there is no model to ask."""
        return None

    def transport(self, rank: int, run: Run) -> Transport:
        """A way that weights go and do not arrive by."""
        return _NoWeights(self)

    async def close(self) -> None:
        """Stop stepping."""
        self.kill()
        await self._stop_stepping()

    def kill(self) -> None:
        """There is no process to end."""
        self._spec = None

    def _going(self) -> list[_Active]:
        return [active for active in self._active.values() if not active.ended]

    def _check_running(self) -> None:
        if self._spec is None:
            raise EngineError("the simulated engine is not running")

    def _go_on(self) -> None:
        if self._active and not self.is_held and (self._steps is None or self._steps.done()):
            self._steps = asyncio.get_running_loop().create_task(self._run())

    async def _stop_stepping(self) -> None:
        if self._steps is not None:
            self._steps.cancel()
            await asyncio.wait([self._steps])

    async def _run(self) -> None:
        spec = self._spec
        assert spec is not None
        while self._active:
            batch, prefix_s = self._slots.fill(list(self._active.values()), self._version)
            await asyncio.sleep(self.step_time(len(batch)) + prefix_s)
            for active in batch:
                if self._active.get(active.request.request_id) is active:
                    self._step(active, spec.vocab_size)
            if self._spec is None:
                return

    def _step(self, active: _Active, vocab_size: int) -> None:
        if self.tokens_made == self.faults.die_after_tokens:
            self._spec = None
            for other in self._active.values():
                other.chunks.put_nowait(EngineError("the simulated engine died, as told to"))
            return
        request, kv_version = active.request, active.kv_version
        if active.ended:
            return
        assert kv_version is not None
        stops = request.decoding.stop_token_ids
        stop = stops[0] if stops else -1
        mean = active.mean if stops else math.inf
        token, logprob = draw(active.state, self._version, kv_version, vocab_size, stop, mean)
        active.add(token, logprob, self._version, kv_version)
        self.tokens_made += 1
        ending: Ending | None = None
        if token in stops:
            ending = "stop"
        elif active.made == request.max_new_tokens:
            ending = "length"
        if self._happens(active, 5, self.faults.empty_chunk_rate):
            nothing = () if request.decoding.logprobs else None
            active.chunks.put_nowait(Chunk((), nothing, active.unread_version))
        if ending:
            if self._happens(active, 6, self.faults.late_finish_rate):
                active.hand_over(self._version)
            active.hand_over(self._version, ending)
        elif len(active.unread) >= self.stream_interval:
            active.hand_over(self._version)

    @staticmethod
    def _happens(active: _Active, salt: int, rate: float) -> bool:
        return mix(active.state, salt) / 2**64 < rate


class _NoWeights:
    """A transport to an engine that has none; see :class:`Transport`."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine

    def send(self, weights: Weights) -> None:
        """Go through them, as all of the trainer's ranks must, and keep nothing."""
        if not self._engine.is_held:
            raise WeightSyncError("weights came to an engine that is not held")
        for _ in weights():
            pass

    def explain(self, weights: Weights) -> str:
        """Nothing to say."""
        return ""

    def close(self) -> None:
        """There is nothing to let go of."""
