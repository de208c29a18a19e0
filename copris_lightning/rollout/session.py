"""What runs on rank 0 only: the rollout thread with its engine and rewards."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar

from copris_lightning.core.buffer import CarryOverBuffer
from copris_lightning.core.trajectory import Trajectory
from copris_lightning.engines.engine import Decoding, Engine, EngineSpec
from copris_lightning.errors import under
from copris_lightning.rollout.decoding import ResponseDecoder
from copris_lightning.rollout.loop_thread import CLEANUP_S, LoopThread
from copris_lightning.rollout.rewards import RewardScorer
from copris_lightning.rollout.scheduler import Event, RolloutScheduler
from copris_lightning.rollout.shared_engine import SharedEngine
from copris_lightning.rollout.spawning import refuse_second_run
from copris_lightning.rollout.stops import StopStrings
from copris_lightning.rollout.task import Accept, PromptQueue, Task

T = TypeVar("T")

BRIEF_S = 60.0
"""How long what takes no time may take on the rollout thread, in seconds."""

_HEAD_START_S = 30.0
"""How long the engine's boot waits for the reward's workers, in seconds."""


class RolloutSession:
    """A booted engine on its own thread.

    Args:
        engine: is started here and closed by :meth:`close`.
        spec: what the run needs of it.
        scorer: computes rewards; closed by :meth:`close`.
        decode: response tokens to text.
        on_wait: called about five times a second while this thread waits; may raise to stop.
    """

    def __init__(
        self,
        engine: Engine,
        spec: EngineSpec,
        scorer: RewardScorer,
        decode: ResponseDecoder,
        on_wait: Callable[[], None],
    ) -> None:
        refuse_second_run()
        self.engine = engine
        self.shared = SharedEngine(engine, spec.cap, keeps=spec.keeps, streams=spec.streams)
        """The engine as schedulers share it; holds and releases it."""
        self._scorer = scorer
        self.decode = decode
        self._on_wait = on_wait
        self._schedulers: list[RolloutScheduler] = []
        self._closed = threading.Lock()
        self._loop = LoopThread(engine.new_event_loop)
        with _stopped_once():
            try:
                self.call(self._start(spec))
            except BaseException:
                self.close()
                raise

    async def _start(self, spec: EngineSpec) -> None:
        # A reward that cannot be imported is better known before the engine boots; one that takes
        # long to import does that while the engine boots.
        workers = asyncio.create_task(self._scorer.start())
        try:
            done, _ = await asyncio.wait([workers], timeout=_HEAD_START_S)
            for task in done:
                task.result()
            with under("engine"):
                await self.engine.start(spec)
            await workers
        finally:
            workers.cancel()

    def call(self, work: Coroutine[Any, Any, T], *, watch: bool = True) -> T:
        """Run a coroutine on the rollout thread and wait for its result.

        Args:
            work: runs on the engine's loop.
            watch: call ``on_wait`` meanwhile, which may stop it. Not for what takes no time and
                must also be had of a run that is being ended, such as its state.
        """
        if watch:
            return self._loop.call(work, on_wait=self._on_wait)
        return self._loop.call(work, timeout_s=BRIEF_S)

    @property
    def is_open(self) -> bool:
        """Whether :meth:`close` was not called yet."""
        return not self._closed.locked()

    @property
    def reward_name(self) -> str:
        """The reward's class or function."""
        return self._scorer.name

    def new_scheduler(
        self,
        buffer: CarryOverBuffer,
        prompts: PromptQueue,
        *,
        decoding: Decoding,
        seed: int,
        name: str,
        accept: Accept | None = None,
        observer: Callable[[Event], None],
        is_alone: bool = False,
    ) -> RolloutScheduler:
        """A scheduler on this engine; closed with the session."""
        task = Task(
            prompts=prompts,
            scorer=self._scorer,
            decode=self.decode,
            decoding=decoding,
            stops=StopStrings(tuple(decoding.sampling.stop), self.decode.verbatim),
            accept=accept or (lambda group: True),
            seed=seed,
            name=name,
        )
        scheduler = RolloutScheduler(self.shared, buffer, task, observer, is_alone=is_alone)
        self._schedulers.append(scheduler)
        return scheduler

    def record(self, trajectory: Trajectory) -> dict[str, Any]:
        """A trajectory as the ledger and predictions show it: plain values."""
        verdict, credit = trajectory.verdict, trajectory.credit
        return {
            "prompt_id": trajectory.prompt_id,
            "sample": trajectory.sample,
            "segments": [
                {"version": s.version, "kv_version": s.kv_version, "tokens": s.length}
                for s in trajectory.segments
            ],
            "finish_reason": trajectory.finish_reason,
            "prompt_tokens": len(trajectory.prompt),
            "response_tokens": trajectory.response_length,
            "reward": trajectory.reward,
            "parts": dict(verdict.parts) if verdict else {},
            "advantage": credit.advantage if credit else None,
            **({"excluded": credit.excluded.reason} if credit and credit.excluded else {}),
            "response": self.decode(trajectory.tokens),
        }

    def close(self) -> None:
        """End the thread, the engine's processes and the reward's. May be called twice."""
        if not self._closed.acquire(blocking=False):
            return
        with ExitStack() as steps:  # last in, first out; each runs even if another fails
            steps.callback(self._loop.close)
            steps.callback(self._close_engine)
            steps.callback(self._scorer.close)
            for scheduler in list(self._schedulers):
                steps.callback(self.close_scheduler, scheduler)

    def close_scheduler(self, scheduler: RolloutScheduler) -> None:
        """Cancel what a scheduler has going and let go of it."""
        self._schedulers = [s for s in self._schedulers if s is not scheduler]
        self._loop.call(scheduler.close(), timeout_s=BRIEF_S)

    def _close_engine(self) -> None:
        """Close it, or kill its processes: Python's end would wait for them."""
        try:
            self._loop.call(self.engine.close(), timeout_s=CLEANUP_S)
        except BaseException:  # it hangs, or whoever waits for it was told to stop
            self.engine.kill()
            raise


@contextmanager
def _stopped_once() -> Iterator[None]:
    """Within the block the first SIGTERM or Ctrl-C is an exception, and later ones are nothing: all
    that was started gets cleaned up. Lightning listens to SIGTERM only once everything is set up;
    until then it would end this process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped:
            return
        stopped = True
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    # Whoever has a handler of their own, or ignores the signal, goes on doing so.
    plain: dict[signal.Signals, Callable[[int, FrameType | None], Any] | signal.Handlers] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    ours = [number for number in plain if signal.getsignal(number) == plain[number]]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, plain[number])
