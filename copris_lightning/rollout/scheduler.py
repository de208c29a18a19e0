"""Keeps the cap full, takes a batch when it is ready, and carries the rest over.

All of it runs on one event loop, and every decision is made without awaiting between looking at
the buffer and changing it. So in flight equals the cap at every moment of a stage while work is
left, and what a chunk brought is in the buffer before anything else can happen.

Each trajectory is an :class:`Episode`, a task of its own that outlives stages: its stream goes on
through a hold, or is ended by it and then it waits for its next turn.
:class:`~copris_lightning.rollout.shared_engine.SharedEngine` knows which, and when there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from copris_lightning.core.buffer import CarryOverBuffer, Key, Status
from copris_lightning.core.segments import Span, between
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.engines.engine import Chunk, Engine
from copris_lightning.engines.virtual_time import time_passes
from copris_lightning.errors import EngineError, RolloutError
from copris_lightning.rollout.episode import Episode
from copris_lightning.rollout.figures import Figures, StageStats
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.task import Task

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


class RolloutScheduler:
    """Rolls a task out on an engine. See the module's first lines for what it guarantees.

    Args:
        shared: the engine, and the cap over all who generate on it.
        buffer: knows which trajectory is where.
        task: the prompts, and how they are answered and scored.
        observer: called with every :class:`Event`; must not block.
        is_alone: nobody else may generate from its first stage on until it is closed.
    """

    def __init__(
        self,
        shared: SharedEngine,
        buffer: CarryOverBuffer,
        task: Task,
        observer: Callable[[Event], None] = lambda event: None,
        *,
        is_alone: bool = False,
    ) -> None:
        stop_token_ids = tuple(sorted(buffer.stop_token_ids))
        self.shared = shared
        self.buffer = buffer
        self.task = replace(task, decoding=replace(task.decoding, stop_token_ids=stop_token_ids))
        self.observer = observer
        self.is_alone = is_alone
        self.wants_work = False
        self.figures = Figures(buffer)
        self._episodes: dict[Key, Episode] = {}
        self._streaming: set[Key] = set()
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()
        self._requests = 0
        shared.join(self)

    async def take(self) -> tuple[list[PromptGroup], StageStats]:
        """Generate until a batch of B complete groups is ready, hold the engine unless it streams,
        and take the batch.

        If it fails or is cancelled, nothing is in flight afterwards; and neither is it otherwise,
        unless streams are kept or go on. Every token of a stream that was ended is in the buffer.
        Rewards still being computed go on during training; a failure among them is raised by the
        next call.

        Raises:
            EngineError: the engine failed; names the prompt if that was asked for.
            RewardError: a reward failed; names the prompt.
            RolloutError: the prompts are used up before the batch is full, or too many groups in
                a row were dropped.
        """
        with time_passes():
            await self._stage()
        self._raise_failure()
        groups = self.buffer.take()
        self._emit("deliver")
        tokens = sum(t.response_length for group in groups for t in group.trajectories)
        return groups, self.figures.delivered(tokens)

    async def _stage(self) -> None:
        """From here to a batch that is ready."""
        self.buffer.advance(max(self.shared.version, self.buffer.version))
        self.buffer.settle()
        if not self.wants_work:
            self.figures.begin(asyncio.get_running_loop().time(), self.in_flight)
        try:
            self._raise_failure()
            if self._goes_on or not self.buffer.can_take():
                await self.shared.begin_stage(self)
                await self._until_ready()
        except BaseException:
            self.wants_work = False
            with suppress(EngineError):  # what failed first says more
                await self.shared.end_streams()
            raise
        await self.shared.end_stage(self)
        self.figures.end(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """Cancel what is still being generated or scored. The buffer keeps what it has."""
        self.wants_work = False
        await _cancel([episode.work for episode in self._episodes.values()])
        self._carry_over()
        await self.shared.leave(self)

    async def snapshot(self) -> dict[str, Any]:
        """The buffer, the place in the prompts and the limit, as plain values and tensors.

        Streams that are open end first: what a run goes on from holds every token that was made,
        each with its label, and whoever saved it goes on from there as well.
        """
        with suppress(EngineError):  # what was received is there
            await self.shared.end_streams()
        state: dict[str, Any] = {"buffer": self.buffer.state_dict()}
        state |= {"prompts": self.task.prompts.state_dict(), "places": self.shared.places.limit()}
        await self.shared.go_on()
        return state

    async def _until_ready(self) -> None:
        self._score_restored()
        while not self.buffer.can_take():
            self.wants_work = True
            self._raise_failure()
            self.shared.fill()
            if self.shared.has_room and not self.in_flight + self.buffer.count(Status.FINISHED):
                raise RolloutError(
                    f"the prompts are used up: {self.buffer.ready_groups} groups are ready, "
                    f"a batch takes {self.buffer.batch_groups}"
                )
            self._changed.clear()
            await self._changed.wait()
        self.wants_work = self._goes_on
        self._raise_failure()

    # -- starting work ---------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Trajectories in flight."""
        return self.buffer.in_flight

    def fill(self) -> None:
        """Start trajectories until the cap is reached or nothing may be started."""
        self.buffer.limit = self.shared.limit
        while self.wants_work and self.shared.has_room:
            if (trajectory := self.buffer.next()) is not None:
                self._start(trajectory)
                continue
            if not self.buffer.may_admit():
                return
            queued = self.task.prompts.next()
            if queued is None:
                return
            self.buffer.admit(queued.prompt.id, queued.index, queued.token_ids)

    def _start(self, trajectory: Trajectory) -> None:
        key = (trajectory.group_id, trajectory.sample)
        self._streaming.add(key)
        if key not in self._episodes:
            self._spawn(trajectory)
        self._episodes[key].go_on()
        self.figures.resent(length := trajectory.response_length)
        self._emit("resume" if length else "start", key, length)

    def _score_restored(self) -> None:
        """Finished trajectories of a loaded state are scored again: their tasks are gone."""
        for key in self.buffer.keys(Status.FINISHED):
            if key not in self._episodes:
                self._spawn(self.buffer.trajectory(key))

    def _spawn(self, trajectory: Trajectory) -> None:
        prompt = self.task.prompts.prompt(self.buffer.group(trajectory.group_id).prompt_index)
        episode = Episode(self, trajectory, prompt)
        self._episodes[episode.key] = episode

        def done(work: asyncio.Task[None]) -> None:
            del self._episodes[episode.key]
            if not work.cancelled() and work.exception() is not None:
                self._failure = self._failure or work.exception()
                self._changed.set()

        episode.work.add_done_callback(done)

    # -- what episodes tell ----------------------------------------------------------------

    @property
    def _goes_on(self) -> bool:
        """Whether it generates between two takes, and from its first weights on."""
        return self.shared.streams and not self.is_alone

    @property
    def engine(self) -> Engine:
        """What generates."""
        return self.shared.engine

    @property
    def has_ended(self) -> bool:
        """Whether streams end now, and none may be opened."""
        return self.shared.has_ended

    @property
    def keeps(self) -> bool:
        """Whether streams outlive holds."""
        return self.shared.keeps

    def request_id(self, key: Key) -> str:
        """A name that no request had before."""
        self._requests += 1
        return f"{self.task.name}-{key[0]}-{key[1]}-{self._requests}"

    def received(self, key: Key, chunk: Chunk, kept: int, *, stops: bool) -> bool:
        """Keep the first tokens of a chunk, and start something if the response ends with them."""
        tokens, logprobs = chunk.token_ids, chunk.logprobs
        dropped = len(tokens) - kept
        if dropped:
            # From the end: numbers that were unequal stay so, and are refused.
            tokens, logprobs = tokens[:-dropped], logprobs and logprobs[:-dropped]
        self.buffer.append(key, tokens, logprobs, chunk.version, stops=stops)
        self.figures.received(len(chunk.token_ids), dropped)
        if chunk.ending in ("stop", "length") and self.buffer.status(key) is Status.IN_FLIGHT:
            self.buffer.finish(key, chunk.ending)
        is_finished = self.buffer.status(key) is Status.FINISHED
        if is_finished:
            self.shared.ended()
        if tokens or chunk.ending != "held":  # most holds find nothing unread
            self._emit("chunk", key, len(chunk.token_ids))
        if is_finished:
            self._emit("finish", key)
        return is_finished

    def labelled(self, key: Key, start: int, spans: Sequence[Span]) -> None:
        """Keep the engine's word on who made the tokens from ``start`` on. Where no stream outlives
        a hold it must be what they are labelled already."""
        trajectory = self.buffer.trajectory(key)
        before = between(trajectory.segments, start, trajectory.response_length)
        trajectory.relabel(start, spans)
        after = between(trajectory.segments, start, trajectory.response_length)
        newest = max((span.version for span in spans), default=0)
        if newest > self.buffer.version:
            raise EngineError(f"token of version {newest}, current is {self.buffer.version}")
        if before != after and not self.keeps:
            raise EngineError(f"tokens are labelled {before}, and the engine says {after}")

    def left(self, key: Key) -> None:
        """An episode's stream is closed."""
        self._streaming.discard(key)
        if not self._streaming:
            self._changed.set()

    def scored(self, key: Key, reward: float) -> None:
        """Keep a reward; a complete group is ready, or dropped."""
        is_complete = self.buffer.score(key, reward)
        self._emit("score", key)
        if is_complete:
            self._filter(key)
        if self.buffer.can_take() and not self._goes_on:
            self.wants_work = False  # nothing is started for a stage that is about to end
        self._changed.set()

    def _filter(self, key: Key) -> None:
        """Drop a complete group that is not accepted, and start something in its place."""
        accepted = False
        try:
            accepted = self.task.accept(self.buffer.group(key[0]))
        finally:
            if not accepted:
                group = self.buffer.evict(key[0])
                self.figures.dropped(sum(t.response_length for t in group.trajectories))
                self._emit("drop", key)
        if not accepted:
            self.shared.fill()

    # -- what the engine's other users tell ------------------------------------------------

    def released(self, version: int) -> None:
        """Tokens to come may bear ``version``. (A loaded buffer may be ahead of an engine that
        awaits its first weights.)"""
        self.buffer.advance(max(version, self.buffer.version))
        if self._goes_on and not self.wants_work:
            self.figures.begin(asyncio.get_running_loop().time(), self.in_flight)
        self.wants_work |= self._goes_on
        self._changed.set()

    async def settle(self, *, force: bool = False) -> None:
        """The engine has ended all streams: have them read to their ends, and carry over what
        they hold.

        Args:
            force: cancel them instead, since they may have none.
        """
        if force:
            await _cancel([self._episodes[key].work for key in self._streaming])
        while self._streaming:
            self._changed.clear()
            await self._changed.wait()
        self._carry_over()

    def _carry_over(self) -> None:
        for key in self.buffer.carry_over():
            self._emit("carry_over", key)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _emit(self, kind: EventKind, key: Key | None = None, tokens: int = 0) -> None:
        now = asyncio.get_running_loop().time()
        self.figures.observe(now, self.buffer.in_flight)
        self.observer(Event(kind, now, self.buffer.in_flight, key, tokens))


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait until they are gone."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
