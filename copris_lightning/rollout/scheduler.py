"""Keeps the cap full, ends the stage when the batch is ready, and carries the rest over.

All of it runs on one event loop, and every decision is made without awaiting between looking at
the buffer and changing it. So in flight equals the cap at every moment of a stage while work is
left, and what a chunk brought is in the buffer before anything else can happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, Protocol

from copris_lightning.core.buffer import CarryOverBuffer, Key, Status
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.engines.engine import Chunk, Decoding, Engine, GenerationRequest
from copris_lightning.errors import CoprisError, EngineError, RolloutError
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.stops import StopStrings, StopWatch


@dataclass(frozen=True, slots=True)
class QueuedPrompt:
    """A prompt ready for the engine: the user's prompt, its place in the source, its tokens."""

    prompt: Prompt
    index: int
    token_ids: tuple[int, ...]


class PromptQueue(Protocol):
    """Where fresh prompts come from."""

    def next(self) -> QueuedPrompt | None:
        """The next prompt, or ``None`` when there are no more."""
        ...

    def prompt(self, index: int) -> Prompt:
        """A prompt taken before, for its reward (also after a restore)."""
        ...


Scorer = Callable[[str, Prompt], Awaitable[float]]
Decoder = Callable[[Sequence[int]], str]
Accept = Callable[[PromptGroup], bool]
EventKind = Literal["start", "resume", "chunk", "finish", "score", "drop", "carry_over", "deliver"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for progress bars, logs and tests.

    Attributes:
        kind: what happened.
        time: seconds on the event loop's clock.
        in_flight: trajectories in flight right after it.
        key: the trajectory (for ``drop``, the one whose score completed the group), or ``None``
            for ``deliver``.
        tokens: tokens of a chunk; of the whole prefix for ``start`` and ``resume``.
    """

    kind: EventKind
    time: float
    in_flight: int
    key: Key | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class StageStats:
    """Figures of one stage.

    Attributes:
        seconds: from the first request to the last abort, on the loop's clock.
        tokens: response tokens received.
        resent_tokens: response tokens sent again as prefix when trajectories resumed.
        carried_over: trajectories left unfinished at the end.
        ready_groups: complete groups left for the next batch.
        dropped_groups: complete groups that were not accepted, since the stage before ended.
        in_flight_mean: time average of trajectories in flight.
        dropped_tokens: of ``tokens``, those that came after the end of a stop string.
    """

    seconds: float
    tokens: int
    resent_tokens: int
    carried_over: int
    ready_groups: int
    dropped_groups: int
    in_flight_mean: float
    dropped_tokens: int = 0


class RolloutScheduler:
    """Runs rollout stages on an engine. See the module's first lines for what it guarantees.

    Args:
        engine: generates.
        buffer: knows which trajectory is where.
        prompts: where fresh prompts come from.
        scorer: ``await scorer(response_text, prompt)`` gives the reward.
        decode: response token ids to text, for the scorer only.
        decoding: how the engine is to choose tokens. It stops at the buffer's stop tokens,
            whatever stands here.
        stops: strings that end a response, too.
        seed: of the requests' seeds.
        name: begins every request id, so that two schedulers can share an engine.
        accept: whether a complete group may be trained on; one that may not is dropped, and a
            fresh prompt takes its place. What it raises ends the stage.
        observer: called with every :class:`Event`; must not block.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        buffer: CarryOverBuffer,
        prompts: PromptQueue,
        scorer: Scorer,
        decode: Decoder,
        decoding: Decoding | None = None,
        stops: StopStrings | None = None,
        seed: int = 0,
        name: str = "train",
        accept: Accept = lambda group: True,
        observer: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.engine = engine
        self.buffer = buffer
        self.prompts = prompts
        self.observer = observer
        self._scorer = scorer
        self._decode = decode
        self._decoding = replace(
            decoding or Decoding(), stop_token_ids=tuple(sorted(buffer.stop_token_ids))
        )
        self._stops = stops
        self._seed = seed
        self._name = name
        self._accept = accept
        self._dropped = 0
        self._generating: dict[Key, asyncio.Task[None]] = {}
        self._scoring: dict[Key, asyncio.Task[None]] = {}
        self._failure: BaseException | None = None
        self._wake = asyncio.Event()
        self._requests = 0
        self._stopping = True
        self._clock = _StageClock()

    async def collect(self) -> tuple[list[PromptGroup], StageStats]:
        """Run one stage: until a batch of B complete groups is ready.

        Whatever way it ends, nothing is in flight afterwards and every token received is in the
        buffer. Rewards still being computed go on during training; a failure among them is
        raised by the next call.

        Raises:
            EngineError: the engine failed; names the prompt.
            RewardError: a reward failed; names the prompt.
            RolloutError: the prompts are used up before the batch is full, or too many groups in
                a row were dropped.
        """
        assert not self.buffer.in_flight, "a stage begins with nothing in flight"
        self.buffer.advance(self.engine.version)
        self.buffer.settle()
        self._clock = _StageClock(asyncio.get_running_loop().time())
        self._stopping = False
        try:
            self._raise_failure()
            if not self.buffer.can_take():
                self._score_restored()  # none is still out where nothing is waited for
                self._fill()
            while not self.buffer.can_take():
                self._raise_failure()
                if not self._generating and not self._scoring:
                    raise RolloutError(
                        f"the prompts are used up: {self.buffer.ready_groups} groups are ready, "
                        f"a batch takes {self.buffer.batch_groups}"
                    )
                self._wake.clear()
                await self._wake.wait()
            self._raise_failure()
        finally:
            await self._halt()
        groups = self.buffer.take()
        self._emit("deliver")
        dropped, self._dropped = self._dropped, 0
        return groups, self._clock.stats(self.buffer, dropped)

    async def close(self) -> None:
        """Cancel what is still being generated or scored. The buffer keeps what it has."""
        await self._halt()
        await _cancel(self._scoring)

    # -- starting work ---------------------------------------------------------------------

    def _fill(self) -> None:
        """Start trajectories until the cap is reached or nothing may be started."""
        while not self._stopping:
            trajectory = self.buffer.next()
            if trajectory is not None:
                key = (trajectory.group_id, trajectory.sample)
                self._spawn(self._generating, key, self._generate(key, trajectory))
                length = trajectory.response_length
                self._clock.resent_tokens += length
                self._emit("resume" if length else "start", key, length)
                continue
            if self.buffer.in_flight >= self.buffer.limit or not self.buffer.may_admit():
                return
            queued = self.prompts.next()
            if queued is None:
                return
            self.buffer.admit(queued.prompt.id, queued.index, queued.token_ids)

    def _score_restored(self) -> None:
        """Finished trajectories of a loaded state are scored again: their tasks are gone."""
        for key in self.buffer.keys(Status.FINISHED):
            if key not in self._scoring:
                self._spawn(self._scoring, key, self._score(key))

    def _spawn(
        self,
        tasks: dict[Key, asyncio.Task[None]],
        key: Key,
        work: Coroutine[Any, Any, None],
    ) -> None:
        def done(task: asyncio.Task[None]) -> None:
            del tasks[key]
            if not task.cancelled() and task.exception() is not None and self._failure is None:
                self._failure = task.exception()
            self._wake.set()

        task = asyncio.get_running_loop().create_task(work)
        tasks[key] = task
        task.add_done_callback(done)

    # -- one trajectory --------------------------------------------------------------------

    async def _generate(self, key: Key, trajectory: Trajectory) -> None:
        self._requests += 1
        request = GenerationRequest(
            request_id=f"{self._name}-{key[0]}-{key[1]}-{self._requests}",
            token_ids=tuple(trajectory.sequence),
            max_new_tokens=trajectory.remaining_tokens,
            decoding=self._decoding,
            seed=trajectory_seed(self._seed, *key),
        )
        watch = self._stops.watch(trajectory.tokens) if self._stops else None
        try:
            async with aclosing(self.engine.generate(request)) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason not in (None, "stop", "length"):
                        raise EngineError(
                            f"the engine ended the response to prompt {trajectory.prompt_id!r} "
                            f"by itself: {chunk.finish_reason}"
                        )
                    self._append(key, chunk, watch)
                    finished = self.buffer.status(key) is Status.FINISHED
                    if finished:
                        self._spawn(self._scoring, key, self._score(key))
                        self._fill()
                    self._clock.tokens += len(chunk.token_ids)
                    self._emit("chunk", key, len(chunk.token_ids))
                    if finished:
                        self._emit("finish", key)
                        return
        except CoprisError as error:
            error.add_note(f"while generating prompt {trajectory.prompt_id!r}, sample {key[1]}")
            raise
        except ValueError as error:
            raise EngineError(
                f"prompt {trajectory.prompt_id!r}, sample {key[1]}: the engine sent a chunk that "
                f"does not fit: {error}"
            ) from error
        raise EngineError(
            f"the engine ended the response to prompt {trajectory.prompt_id!r} after "
            f"{trajectory.response_length} tokens without a finish reason"
        )

    def _append(self, key: Key, chunk: Chunk, watch: StopWatch | None) -> None:
        """Keep a chunk, up to the token that completes a stop string: the response ends with it.
        (The engine, which does not know, is told by closing its stream.)"""
        tokens, logprobs = chunk.token_ids, chunk.logprobs
        kept = watch.first_end(tokens) if watch else None
        if kept is not None and kept < len(tokens):
            dropped = len(tokens) - kept
            self._clock.dropped_tokens += dropped
            # From the end: numbers that were unequal stay so, and are refused.
            tokens, logprobs = tokens[:-dropped], logprobs and logprobs[:-dropped]
        self.buffer.append(key, tokens, logprobs, chunk.version, stops=kept is not None)
        if chunk.finish_reason and self.buffer.status(key) is Status.IN_FLIGHT:
            self.buffer.finish(key, chunk.finish_reason)

    async def _score(self, key: Key) -> None:
        trajectory = self.buffer.trajectory(key)
        prompt = self.prompts.prompt(self.buffer.group(key[0]).prompt_index)
        reward = await self._scorer(self._decode(trajectory.tokens), prompt)
        is_complete = self.buffer.score(key, reward)
        self._emit("score", key)
        if is_complete:
            self._filter(key)
        if self.buffer.can_take():
            self._stopping = True  # nothing is started for a stage that is about to end

    def _filter(self, key: Key) -> None:
        """Drop a complete group that is not accepted, and start something in its place."""
        accepted = False
        try:
            accepted = self._accept(self.buffer.group(key[0]))
        finally:
            if not accepted:
                self.buffer.evict(key[0])
                self._dropped += 1
                self._emit("drop", key)
        if not accepted:
            self._fill()

    # -- ending a stage --------------------------------------------------------------------

    async def _halt(self) -> None:
        """Claim everything in flight in one sweep, then stop the engine's work on it."""
        self._stopping = True
        for key in self.buffer.carry_over():
            self._emit("carry_over", key)
        await _cancel(self._generating)
        self._clock.end(asyncio.get_running_loop().time())

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _emit(self, kind: EventKind, key: Key | None = None, tokens: int = 0) -> None:
        now = asyncio.get_running_loop().time()
        self._clock.count(now, self.buffer.in_flight)
        self.observer(Event(kind, now, self.buffer.in_flight, key, tokens))


async def _cancel(tasks: dict[Key, asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they are gone."""
    pending = list(tasks.values())
    for task in pending:
        task.cancel()
    if pending:
        await asyncio.wait(pending)


def trajectory_seed(seed: int, group_id: int, sample: int) -> int:
    """A 63-bit seed that differs for every trajectory of a run."""
    digest = blake2b(repr((seed, group_id, sample)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _StageClock:
    """Adds up one stage's figures as events pass."""

    def __init__(self, start: float = 0.0) -> None:
        self._start = self._last = self._end = start
        self._in_flight = 0
        self._area = 0.0
        self.tokens = 0
        self.dropped_tokens = 0
        self.resent_tokens = 0

    def count(self, now: float, in_flight: int) -> None:
        self._area += self._in_flight * (now - self._last)
        self._last, self._in_flight = now, in_flight

    def end(self, now: float) -> None:
        self._end = now

    def stats(self, buffer: CarryOverBuffer, dropped_groups: int) -> StageStats:
        seconds = self._end - self._start
        return StageStats(
            seconds=seconds,
            tokens=self.tokens,
            resent_tokens=self.resent_tokens,
            carried_over=buffer.count(Status.CARRIED_OVER),
            ready_groups=buffer.ready_groups,
            dropped_groups=dropped_groups,
            in_flight_mean=self._area / seconds if seconds > 0 else 0.0,
            dropped_tokens=self.dropped_tokens,
        )
