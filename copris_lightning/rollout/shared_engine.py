"""An engine, and what all who generate on it share: the cap, its version, and whether it is held.

Two decisions say what happens to streams. With ``keeps`` an engine that is held keeps them, with
their keys and values, and they go on under newer weights; otherwise each hold ends them, and what
they were generating goes on as a new request. With ``streams`` a batch is taken without a hold, and
only new weights make one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, Protocol

from copris_lightning.core.cap import Cap
from copris_lightning.engines.engine import Engine
from copris_lightning.engines.virtual_time import (
    all_that_takes_no_time,
    stand_still,
    time_passes,
    training,
)
from copris_lightning.errors import EngineError
from copris_lightning.rollout.places import Places

State = Literal["ended", "kept", "runs"]
"""Held, and no stream is open; held with its streams; or not held."""

_GRACE_S = 5.0
"""How long a switch may go on after whoever waits for it was told to stop, in seconds."""


class Tenant(Protocol):
    """Someone who generates on a shared engine."""

    @property
    def is_alone(self) -> bool:
        """Whether nobody else may generate between its first stage and its leaving."""
        ...

    @property
    def in_flight(self) -> int:
        """Trajectories that it has on the engine."""
        ...

    @property
    def wants_work(self) -> bool:
        """Whether it starts trajectories where there is room."""
        ...

    def fill(self) -> None:
        """Start what may be started."""
        ...

    def released(self, version: int) -> None:
        """Tokens to come may bear ``version``."""
        ...

    async def settle(self, *, force: bool = False) -> None:
        """The engine has ended all streams: wait until they are read to their ends.

        Args:
            force: cancel them instead, since they may have none.
        """
        ...


class SharedEngine:
    """An engine that several schedulers generate on, under one cap and under one version.

    Args:
        engine: has started, and is held.
        cap: number of trajectories that may be in flight, of all schedulers together: a fixed one,
            or bounds of one that follows the engine's load.
        keeps: whether streams outlive a hold.
        streams: whether it generates between two takes, too.
    """

    def __init__(
        self, engine: Engine, cap: Cap | int, *, keeps: bool = False, streams: bool = False
    ) -> None:
        self.engine = engine
        self.places = Places(engine, Cap(cap, cap) if isinstance(cap, int) else cap)
        self.keeps = keeps
        self.streams = streams
        self.version = engine.version
        """Of the weights that generate, or will after the next release."""
        self._state: State = "ended"
        self._aim: State = "ended"
        self._awaits_release = self._has_new_weights = False
        self._tenants: list[Tenant] = []
        self._alone: Tenant | None = None
        self._switch = asyncio.Lock()

    @property
    def has_ended(self) -> bool:
        """Whether streams are being ended, or have been, and none may be opened."""
        return self._aim == "ended"

    @property
    def has_room(self) -> bool:
        """Whether one more trajectory may be put in flight."""
        return self._aim == "runs" and self._in_flight < self.limit

    @property
    def limit(self) -> int:
        """How many trajectories may be in flight now."""
        return int(self.places.limit(self._alone))

    @property
    def _in_flight(self) -> int:
        return sum(tenant.in_flight for tenant in self._tenants)

    def join(self, tenant: Tenant) -> None:
        """One more generates on it."""
        self._tenants.append(tenant)

    async def leave(self, tenant: Tenant) -> None:
        """It generates no longer; what waited for it goes on."""
        self._tenants = [other for other in self._tenants if other is not tenant]
        self.places.forget(tenant)
        if self._alone is tenant:
            self._alone = None
            await self.go_on()
        self.fill()

    def fill(self) -> None:
        """Have the cap filled: those who came last go first, so an evaluation before training."""
        for tenant in reversed(self._tenants):
            if self._alone in (None, tenant):
                tenant.fill()

    def ended(self) -> None:
        """A trajectory has ended: have the limit follow the engine's load, and places filled."""
        self.places.ended(self._alone, self._in_flight)
        self.fill()

    # -- new weights -----------------------------------------------------------------------

    async def hold(self) -> None:
        """Stop generating until :meth:`release`. A cancel waits for that, too.

        Unless streams are kept, every token that the engine had made is in a buffer when this
        returns, and nothing is in flight.

        Raises:
            EngineError: the engine failed.
        """
        if self.streams:
            stand_still()
        await training()
        if self.streams:
            await all_that_takes_no_time()
        self._awaits_release = True
        await self._stop("kept" if self.keeps else "ended")

    async def release(self, version: int) -> None:
        """Generate under ``version``; streams that were kept go on with the next stage, or at once
        if somebody wants work.

        Raises:
            EngineError: the engine failed.
        """
        self.version, self._awaits_release, self._has_new_weights = version, False, True
        for tenant in self._tenants:
            tenant.released(version)
        if self._is_wanted or not self.keeps:  # else nothing goes on before its time
            await _finish(self._run())

    async def go_on(self) -> None:
        """Generate, if somebody wants it: who waits for a batch or, where the engine streams, who
        has been given weights. An engine that cannot tells whoever needs it next: this is asked by
        those who are done with it."""
        if self._is_wanted:
            with suppress(EngineError):
                await _finish(self._run())

    @property
    def _is_wanted(self) -> bool:
        return any(tenant.wants_work for tenant in self._tenants)

    # -- stages ----------------------------------------------------------------------------

    async def begin_stage(self, tenant: Tenant) -> None:
        """Let the engine run for someone, unless it is held until a release."""
        if self.streams:
            stand_still()
            await all_that_takes_no_time()
        if self._alone is not None and not self._alone.wants_work:
            self._alone = None  # it was not asked for all that it was there for
        if tenant.is_alone and self._alone is None:
            self._alone = tenant
            if any(other.in_flight for other in self._tenants if other is not tenant):
                await self._stop("ended")
        await _finish(self._run())
        self.fill()  # it may have run already, for someone who was alone

    async def end_stage(self, tenant: Tenant) -> None:
        """Hold, unless the engine goes on: for others who wait for a batch, without this one's
        streams, or because it always does."""
        if self.streams and not tenant.is_alone:
            return
        others = any(t.wants_work for t in self._tenants if t is not tenant)
        ended = not self.keeps or tenant.is_alone or others
        await self._stop("ended" if ended else "kept")
        if others and not tenant.is_alone:
            await _finish(self._run())

    async def end_streams(self) -> None:
        """Have every token that the engine has made in a buffer, and nothing in flight, however
        streams are kept otherwise; :meth:`go_on`, or the next stage, lets it go on.

        Raises:
            EngineError: the engine failed.
        """
        if self.streams:
            await all_that_takes_no_time()
        if self._in_flight:
            await self._stop("ended")

    async def _stop(self, aim: State) -> None:
        self._aim = _less(aim, self._aim)  # from this moment on nothing is started
        await _finish(self._hold(aim))

    async def _hold(self, aim: State) -> None:
        async with self._switch:
            aim = self._aim = _less(aim, self._state)
            if aim != self._state:
                self._state = aim
                async with self._ended_if_it_fails():
                    await self.engine.hold(keep=aim == "kept")
            if aim == "ended":
                await self._settle(force=False)

    @asynccontextmanager
    async def _ended_if_it_fails(self) -> AsyncIterator[None]:
        """An engine that fails at a switch, or is left in it, generates for nobody any more."""
        try:
            yield
        except BaseException:
            self._state = self._aim = "ended"
            await self._settle(force=True)
            raise

    async def _settle(self, *, force: bool) -> None:
        for tenant in self._tenants:
            await tenant.settle(force=force)

    async def _run(self) -> None:
        async with self._switch:
            if self._awaits_release or self._state == "runs":
                return
            clear_kv = self._has_new_weights and not self.keeps
            async with self._ended_if_it_fails():
                await self.engine.release(self.version, clear_kv=clear_kv)
            self._has_new_weights = False
            self._state = self._aim = "runs"
            self.places.begin()
            self.fill()


def _less(one: State, other: State) -> State:
    """Of two states, the one in which less goes on."""
    return min(one, other, key=("ended", "kept", "runs").index)


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, though its caller is cancelled meanwhile; but not for ever."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with time_passes():
            await asyncio.wait([task], timeout=_GRACE_S)
        task.cancel()  # nothing, if it has ended
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen; being cancelled comes first
        raise
