"""An engine, and what all who generate on it share: the cap, and whether it is held."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from copris_lightning.engines.engine import Engine


class Tenant(Protocol):
    """Someone who generates on a shared engine."""

    @property
    def in_flight(self) -> int:
        """Trajectories that it has on the engine."""
        ...

    @property
    def is_taking(self) -> bool:
        """Whether it waits for a batch."""
        ...

    def fill(self) -> None:
        """Start what may be started."""
        ...

    def released(self, version: int) -> None:
        """The engine generates again, under ``version``."""
        ...

    async def settle(self, *, force: bool = False) -> None:
        """The engine is held: wait until all its streams are read to their ends.

        Args:
            force: cancel them instead, since they may have none.
        """
        ...


class SharedEngine:
    """An engine that several schedulers generate on, under one cap and under one version.

    Args:
        engine: has started, and is held.
        cap: number of trajectories that may be in flight, of all schedulers together.
    """

    def __init__(self, engine: Engine, cap: int) -> None:
        self.engine = engine
        self.cap = cap
        self.is_held = True
        self._runs = False
        self._awaits_release = False
        self._tenants: list[Tenant] = []
        self._switch = asyncio.Lock()

    @property
    def has_room(self) -> bool:
        """Whether one more trajectory may be put in flight."""
        return not self.is_held and sum(t.in_flight for t in self._tenants) < self.cap

    def join(self, tenant: Tenant) -> None:
        """One more generates on it."""
        self._tenants.append(tenant)

    def leave(self, tenant: Tenant) -> None:
        """It generates no longer."""
        self._tenants = [other for other in self._tenants if other is not tenant]
        self.fill()

    def fill(self) -> None:
        """Have the cap filled: those who came last go first, so an evaluation before training."""
        for tenant in reversed(self._tenants):
            tenant.fill()

    async def hold(self) -> None:
        """Stop generating until :meth:`release`. Every token that the engine had made is in a
        buffer when this returns, and nothing is in flight. A cancel waits for that, too.

        Raises:
            EngineError: the engine failed.
        """
        self._awaits_release = True
        await self._stop()

    async def release(self, version: int) -> None:
        """Generate again, under ``version``, with nothing that was computed with other weights.

        Raises:
            EngineError: the engine failed.
        """
        await _finish(self._release(version))

    async def begin_stage(self) -> None:
        """Let the engine run, unless it is held until a release."""
        await _finish(self._release(None))

    async def end_stage(self) -> None:
        """Hold, unless another waits for a batch: then only those who don't have stopped."""
        was_held = self.is_held
        await self._stop()
        if not was_held and any(tenant.is_taking for tenant in self._tenants):
            await self.begin_stage()

    async def _stop(self) -> None:
        self.is_held = True  # from this moment on nothing is started
        await _finish(self._hold())

    async def _hold(self) -> None:
        async with self._switch:
            self.is_held = True
            if self._runs:
                self._runs = False
                try:
                    await self.engine.hold()
                except BaseException:
                    await self._settle(force=True)
                    raise
            await self._settle(force=False)

    async def _settle(self, *, force: bool) -> None:
        for tenant in self._tenants:
            await tenant.settle(force=force)

    async def _release(self, version: int | None) -> None:
        """``None`` to go on with the same weights, if a hold does not await others."""
        async with self._switch:
            if version is None and (self._awaits_release or self._runs):
                return
            has_new_weights = version is not None
            version = self.engine.version if version is None else version
            await self.engine.release(version, clear_kv=has_new_weights)
            self._awaits_release, self._runs, self.is_held = False, True, False
            for tenant in self._tenants:
                tenant.released(version)


async def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, though its caller is cancelled meanwhile."""
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen; being cancelled comes first
        raise
