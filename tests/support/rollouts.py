"""A rollout on the simulated engine that remembers all that went by, and its tokens' oracle."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Any

from trajectories import single

from copris_lightning.core.buffer import CarryOverBuffer, Key, Status
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.engines.engine import Chunk, Decoding, EngineSpec, GenerationRequest
from copris_lightning.engines.simulated import SimulatedEngine
from copris_lightning.engines.simulated_tokens import (
    Faults,
    LengthModel,
    StepTime,
    simulate_token,
)
from copris_lightning.engines.virtual_time import VirtualClockLoop
from copris_lightning.rollout.figures import StageStats
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.stops import StopStrings
from copris_lightning.rollout.task import Accept, QueuedPrompt, Task, trajectory_seed

VOCAB = 50
STOP = 3


class RecordingEngine(SimulatedEngine):
    """Notes every request, and every token that it hands to the scheduler, by seed."""

    def __init__(self, lengths: LengthModel, faults: Faults, stream_interval: int = 1) -> None:
        super().__init__(lengths, StepTime(0.02, 0.0002), faults, stream_interval)
        self.requests: list[GenerationRequest] = []
        self.releases: list[tuple[int, bool]] = []
        self.emitted: dict[int, list[int]] = {}

    async def release(self, version: int, *, clear_kv: bool = True) -> None:
        self.releases.append((version, clear_kv))
        await super().release(version, clear_kv=clear_kv)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        async with aclosing(super().stream(request)) as chunks:
            async for chunk in chunks:
                self.emitted.setdefault(request.seed, []).extend(chunk.token_ids)
                yield chunk


class CountingPrompts:
    """Prompt ``i`` is called ``p<i>``; ``limit`` of them, or no end."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.taken = 0

    def next(self) -> QueuedPrompt | None:
        if self.taken == self.limit:
            return None
        self.taken += 1
        return self.get(self.taken - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]

    def prompt(self, index: int) -> Prompt:
        return self.get(index).prompt

    def get(self, index: int) -> QueuedPrompt:
        tokens = (10 + index % 7, *range(20, 21 + index % 4))
        return QueuedPrompt(Prompt(f"p{index}", text=str(index)), index, tokens)


async def constant_reward(response: str, prompt: Prompt) -> float:
    return 1.0


class Rollout:
    """One scheduler with everything it needs, on virtual time."""

    def __init__(
        self,
        *,
        cap: int = 12,
        batch_groups: int = 2,
        group_size: int = 3,
        max_new_tokens: int = 48,
        max_staleness: int | None = None,
        median: float = 8.0,
        sigma: float = 1.0,
        prompts: int | None = None,
        seed: int = 0,
        faults: Faults | None = None,
        scorer: Any = constant_reward,
        engine: Any = None,
        shared: SharedEngine | None = None,
        stream_interval: int = 1,
        loop: VirtualClockLoop | None = None,
        name: str = "train",
        decode: Callable[[Sequence[int]], str] = lambda token_ids: " ".join(map(str, token_ids)),
        stops: tuple[str, ...] = (),
        accept: Accept = lambda group: True,
        logprobs: bool = True,
        keeps: bool = False,
        streams: bool = False,
        training_s: float = 0.0,
        is_alone: bool = False,
    ) -> None:
        self.seed = seed
        self.loop = loop or VirtualClockLoop(training_s)
        self.prompts = CountingPrompts(prompts)
        self.events: list[Event] = []
        self.watchers: list[Callable[[Event], None]] = []
        self.groups: list[PromptGroup] = []
        self.buffer = CarryOverBuffer(
            limit=cap,
            group_size=group_size,
            batch_groups=batch_groups,
            max_new_tokens=max_new_tokens,
            stop_token_ids=(STOP,),
            max_staleness=max_staleness,
        )
        if shared is None:
            if engine is None:
                lengths = LengthModel(median, sigma)
                engine = RecordingEngine(lengths, faults or Faults(), stream_interval)
                self.run(engine.start(EngineSpec("none", cap, max_new_tokens + 10, VOCAB)))
            shared = SharedEngine(engine, cap, keeps=keeps, streams=streams)
        self.shared = shared
        self.engine: Any = shared.engine
        task = Task(
            self.prompts,
            scorer,
            decode,
            Decoding(logprobs=logprobs),
            stops=StopStrings(stops, decode),
            accept=accept,
            seed=seed,
            name=name,
        )
        self.scheduler = RolloutScheduler(
            shared, self.buffer, task, self._observe, is_alone=is_alone
        )

    def _observe(self, event: Event) -> None:
        self.events.append(event)
        for watch in self.watchers:
            watch(event)

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def collect(self) -> tuple[list[PromptGroup], StageStats]:
        """One stage; what it delivers is also kept in ``groups``."""
        groups, stats = self.run(self.scheduler.take())
        self.groups += groups
        return groups, stats

    def sync(self, version: int | None = None) -> None:
        """New weights: the next version, or the given one."""
        version = self.shared.version + 1 if version is None else version
        self.run(self.swap(version))

    async def swap(self, version: int) -> None:
        """What a sync does."""
        await self.shared.hold()
        await self.shared.release(version)

    def stages(self, count: int) -> None:
        """Stages with a weight update after each."""
        for _ in range(count):
            self.collect()
            self.sync()

    def close(self) -> None:
        if not self.loop.is_closed():
            self.run(self.scheduler.close())
            self.run(self.engine.close())
            self.loop.close()

    def end_streams(self) -> None:
        """Have every token in the buffer, with its label."""
        self.run(self.shared.end_streams())

    # -- looking ---------------------------------------------------------------------------

    def of_kind(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    def trained(self) -> list[str]:
        """Ids of the prompts delivered so far."""
        return [group.trajectories[0].prompt_id for group in self.groups]

    def seed_of(self, key: Key) -> int:
        return trajectory_seed(self.seed, *key)

    def check_tokens(self, trajectory: Trajectory) -> None:
        """Compute every token and log-prob again, from its version and all that precedes it."""
        seed = self.seed_of((trajectory.group_id, trajectory.sample))
        prefix = list(trajectory.prompt)
        made = zip(trajectory.tokens, trajectory.column("engine"), strict=True)
        for segment in trajectory.segments:
            for token, logprob in islice(made, segment.length):
                expected, exact = simulate_token(
                    segment.version,
                    segment.kv_version,
                    prefix,
                    seed,
                    vocab_size=VOCAB,
                    stop=STOP,
                    mean=self.engine.lengths.mean(seed),
                )
                assert (token, logprob) == (expected, *single([exact]))
                prefix.append(token)
        response = trajectory.tokens.tolist()
        assert STOP not in response[:-1]
        assert len(response) <= self.buffer.max_new_tokens
        ended = response[-1:] == [STOP] or len(response) == self.buffer.max_new_tokens
        assert ended == (trajectory.finish_reason is not None)
        if trajectory.finish_reason is not None:
            assert trajectory.finish_reason == ("stop" if response[-1] == STOP else "length")

    def check_all_tokens(self) -> None:
        """The oracle over all that was delivered, and all that is still in the buffer."""
        for group in self.groups:
            for trajectory in group.trajectories:
                assert trajectory.finish_reason is not None
                self.check_tokens(trajectory)
        for trajectory in self.buffer.trajectories():
            self.check_tokens(trajectory)

    def check_conservation(self) -> None:
        """Every trajectory ever admitted is in exactly one place."""
        assert self.buffer.admitted == self.prompts.taken * self.buffer.group_size
        assert self.buffer.admitted == sum(self.buffer.count(status) for status in Status)
        inside = {t.prompt_id for t in self.buffer.trajectories()}
        assert sorted([*self.trained(), *inside]) == sorted(
            f"p{i}" for i in range(self.prompts.taken)
        )
