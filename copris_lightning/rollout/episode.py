"""One trajectory on its way from the first token to its reward, over as many stages as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Protocol

from copris_lightning.core.buffer import Key
from copris_lightning.core.segments import Span, between
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.engines.engine import Chunk, Engine, GenerationRequest
from copris_lightning.errors import CoprisError, EngineError
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.task import Task, trajectory_seed


class Host(Protocol):
    """Whoever keeps the episodes, and the buffer that their tokens go to."""

    @property
    def task(self) -> Task:
        """How to ask the engine, and for the reward."""
        ...

    @property
    def engine(self) -> Engine:
        """What generates."""
        ...

    @property
    def has_ended(self) -> bool:
        """Whether streams end by a hold now, and none may be opened."""
        ...

    @property
    def keeps(self) -> bool:
        """Whether streams outlive holds, so that labels may change until they end."""
        ...

    def request_id(self, key: Key) -> str:
        """A name that no request had before."""
        ...

    def received(self, key: Key, chunk: Chunk, kept: int, *, stops: bool) -> bool:
        """The first ``kept`` tokens of a chunk are the response's next.

        Args:
            stops: the response ends with the last of them.

        Returns:
            whether it is finished.
        """
        ...

    def labelled(self, key: Key, start: int, spans: Sequence[Span]) -> None:
        """The engine's word on who made the tokens from ``start`` on.

        Raises:
            ValueError: it cannot be.
        """
        ...

    def left(self, key: Key) -> None:
        """Its stream is closed."""
        ...

    def scored(self, key: Key, reward: float) -> None:
        """Its reward is known."""
        ...


class Episode:
    """Generates one trajectory and has it scored: a stream for each turn that it is given, then
    the reward. Its task fails with an EngineError or RewardError that names the prompt.

    Args:
        host: keeps its tokens.
        trajectory: as far as it is; a finished one is only scored.
        prompt: what it answers, for the reward.
    """

    def __init__(self, host: Host, trajectory: Trajectory, prompt: Prompt) -> None:
        self.key = (trajectory.group_id, trajectory.sample)
        self._host = host
        self._trajectory = trajectory
        self._prompt = prompt
        self._turn = asyncio.Event()
        stops = host.task.stops
        self._watch = stops.watch(trajectory.tokens) if stops else None
        self.work = asyncio.get_running_loop().create_task(self._run())
        """Ends with the reward."""

    def go_on(self) -> None:
        """Give it a turn on the engine: until it is finished, or the engine is held."""
        self._turn.set()

    async def _run(self) -> None:
        while self._trajectory.finish_reason is None:
            try:
                await self._turn.wait()
                self._turn.clear()
                await self._generate()
            finally:
                self._host.left(self.key)
        await asyncio.sleep(0)  # what others got in this moment is read first
        response = self._host.task.decode(self._trajectory.tokens)
        self._host.scored(self.key, await self._host.task.scorer(response, self._prompt))

    async def _generate(self) -> None:
        trajectory = self._trajectory
        try:
            await self._stream()
        except CoprisError as error:
            error.add_note(
                f"while generating prompt {trajectory.prompt_id!r}, sample {trajectory.sample}"
            )
            raise
        except ValueError as error:
            raise EngineError(
                f"prompt {trajectory.prompt_id!r}, sample {trajectory.sample}: the engine sent a "
                f"chunk that does not fit: {error}"
            ) from error

    async def _stream(self) -> None:
        """One request, to its end or the hold's."""
        if self._host.has_ended:
            return  # a hold is on its way to the engine, and would end the request at once
        trajectory, task = self._trajectory, self._host.task
        request = GenerationRequest(
            request_id=self._host.request_id(self.key),
            token_ids=tuple(trajectory.sequence),
            max_new_tokens=trajectory.remaining_tokens,
            decoding=task.decoding,
            seed=trajectory_seed(task.seed, *self.key),
        )
        start, received = trajectory.response_length, 0
        async with aclosing(self._host.engine.stream(request)) as chunks:
            async for chunk in chunks:
                received += len(chunk.token_ids)
                is_over = trajectory.finish_reason is None and self._receive(chunk)
                if chunk.ending is not None:
                    self._label(chunk, start, received)
                if is_over or chunk.ending is not None:
                    return
        raise EngineError(f"the engine's stream ended after {received} tokens without saying why")

    def _receive(self, chunk: Chunk) -> bool:
        """Keep a chunk, up to the token that completes a stop string: the response ends with it.
        (The engine, which does not know, is told by closing its stream; the labels stay what was
        known of them.)

        Returns:
            whether nothing more is to be read.
        """
        if chunk.ending not in (None, "stop", "length", "held"):
            raise EngineError(f"the engine ended the response by itself: {chunk.ending}")
        if chunk.ending == "held" and not self._host.has_ended:
            raise EngineError("the engine was held by somebody else")
        end = self._watch.first_end(chunk.token_ids) if self._watch else None
        kept = len(chunk.token_ids) if end is None else end
        is_finished = self._host.received(self.key, chunk, kept, stops=end is not None)
        # The engine's word on who made it may still come, and may change its labels.
        return is_finished and (end is not None or not self._host.keeps)

    def _label(self, chunk: Chunk, start: int, received: int) -> None:
        """Take the engine's word on who made which token of its stream."""
        if sum(span.length for span in chunk.spans) != received:
            raise EngineError(f"the engine sent {received} tokens, and its spans are {chunk.spans}")
        kept = self._trajectory.response_length - start  # without what follows a stop string
        self._host.labelled(self.key, start, between(chunk.spans, 0, kept))
