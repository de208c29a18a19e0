"""vLLM's processes: their start, the watch over every call to them, and their end."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from copris_lightning.engines.environment import exported, sockets
from copris_lightning.engines.last_words import logging_config, read_cause
from copris_lightning.engines.owner import OWNER_VARIABLE, owner
from copris_lightning.engines.vllm_load import KVWatch
from copris_lightning.engines.watchdog import Deadlines, SilenceWatch, Watchdog, obituary
from copris_lightning.errors import EngineError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    import psutil
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

_NAMES = ("EngineCore", "VLLM_DP_Coordinator")
"""How the names of the processes begin that vLLM starts from here."""

_KEY = "engine.deadlines"
_SHUTDOWN_S = 20.0
"""How long the engine's processes may take to end by themselves, in seconds."""
_ORPHAN_S = 5.0
"""How long the workers may outlive the engine's core."""
_GIVE_UP_S = 30.0
"""How long a boot may take to notice that its processes were killed."""
_REAP_TIMES = 50
"""How often to look for the exit code of a core that ended in the boot, every 20 ms."""
_LATELY_S = 60.0
"""How long before its end an engine may have told the reason, in seconds."""
_STREAMS_S = 2.0
"""How long vLLM may take to end the streams of an engine that has died, in seconds."""
_LAST_WORDS_S = 5.0
"""How long to wait for a dying engine's exit code, where nothing else says what it dies of. Told to
stop, it takes up to 15 s."""

_log = logging.getLogger(__name__)


class VLLMProcesses:
    """One engine's processes. All coroutines run on the engine's loop.

    Args:
        deadlines: for what they are asked to do.
        hand_over: how the paths begin that this process shares with them; see
            :func:`copris_lightning.weights.files.hand_over_prefix`.

    Attributes:
        silence: is told of each request and of all that the engine sends; an engine that hangs
            while it has some is killed.
        kv: how full the KV cache is, where that was asked for.
    """

    def __init__(self, deadlines: Deadlines, hand_over: str) -> None:
        self._deadlines = deadlines
        self._hand_over = hand_over
        self._directory: Path | None = None
        self._find_cores: Callable[[], list[BaseProcess]] = list
        self._cores: list[BaseProcess] = []
        self._workers: list[psutil.Process] = []
        self._watchdog: Watchdog | None = None
        self._stalled = ""
        self.kv: KVWatch | None = None
        self.silence = SilenceWatch(deadlines.stall_s, self._end_stalled)

    # -- start -----------------------------------------------------------------------------

    async def boot(
        self,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str | None],
        *,
        tells_load: bool = False,
    ) -> AsyncLLM:
        """Start vLLM; the loop goes on meanwhile.

        Args:
            arguments: of ``AsyncEngineArgs``.
            environment: variables for the processes; ``None`` unsets one.
            tells_load: have ``kv`` know how full the KV cache is.

        Raises:
            EngineError: it did not start (in time); says why.
        """
        self._stalled = ""
        self.kv = KVWatch() if tells_load else None
        # Removed with the weights' own directories by the workers, if this process is killed.
        parent, prefix = os.path.split(self._hand_over)
        self._directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        booting = asyncio.wrap_future(self._boot_in_thread(arguments, environment))
        try:
            llm = await self._booted(booting)
        except BaseException:
            await self._give_up(booting)
            raise
        self._workers = _children(self._cores)
        self._watchdog = Watchdog(self._cores, self._cause)
        self._watchdog.on_death(lambda: self._end_streams(llm))
        return llm

    def _boot_in_thread(
        self, arguments: Mapping[str, Any], environment: Mapping[str, str | None]
    ) -> Future[AsyncLLM]:
        """Boot in a daemon thread: vLLM's start blocks, and some of it cannot be cut short."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        booting: Future[AsyncLLM] = Future()
        watches = None if self.kv is None else [self.kv]
        before = set(multiprocessing.active_children())
        variables = {
            **sockets(self._directory),
            **environment,
            OWNER_VARIABLE: owner(self._hand_over),
        }

        def boot() -> None:
            booting.set_running_or_notify_cancel()
            try:
                with exported(variables), exported(self._logging_variables()):
                    llm = AsyncLLM.from_engine_args(
                        AsyncEngineArgs(**arguments), stat_loggers=watches
                    )
                booting.set_result(llm)
            except BaseException as error:  # noqa: BLE001 - handed to whoever awaits the boot
                booting.set_exception(error)

        def cores() -> list[BaseProcess]:
            children = set(multiprocessing.active_children()) - before
            return [child for child in children if child.name.startswith(_NAMES)]

        self._find_cores = cores
        threading.Thread(target=boot, name="copris-vllm-boot", daemon=True).start()
        return booting

    async def _booted(self, booting: asyncio.Future[AsyncLLM]) -> AsyncLLM:
        """Wait for the boot, its deadline, or the end of a process that vLLM does not notice."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._deadlines.boot_s
        dead_since: float | None = None
        while not booting.done():
            await asyncio.wait({booting}, timeout=0.5)
            self._cores += [core for core in self._find_cores() if core not in self._cores]
            if dead_since is None and any(core.exitcode is not None for core in self._cores):
                dead_since = loop.time()
            if loop.time() > deadline:
                raise EngineError(
                    f"vLLM did not start within {_KEY}.boot_s={self._deadlines.boot_s:g} s"
                )
            if dead_since is not None and loop.time() > dead_since + _LAST_WORDS_S:
                raise EngineError(f"vLLM did not start: {obituary(self._cores, self._cause())}")
        try:
            return booting.result()
        except (ValueError, RuntimeError, OSError) as error:
            reason = self._cause() or await self._how_they_ended() or " ".join(str(error).split())
            raise EngineError(f"vLLM did not start: {reason}") from error

    async def _how_they_ended(self) -> str:
        """Of what the cores died in the boot; empty if they live."""
        self._cores += [core for core in self._find_cores() if core not in self._cores]
        for _ in range(_REAP_TIMES):  # vLLM may see a core's end before its exit code is there
            if any(core.exitcode is not None for core in self._cores):
                return obituary(self._cores, "")
            await asyncio.sleep(0.02)
        return ""

    async def _give_up(self, booting: asyncio.Future[AsyncLLM]) -> None:
        """Kill what the boot has started, and what it still starts until it notices."""
        until = asyncio.get_running_loop().time() + _GIVE_UP_S
        while not booting.done() and asyncio.get_running_loop().time() < until:
            self._cores += [core for core in self._find_cores() if core not in self._cores]
            self.kill()
            await asyncio.wait({booting}, timeout=0.2)
        self.kill()
        if booting.done() and booting.exception() is None:
            booting.result().shutdown(timeout=0)

    def _logging_variables(self) -> dict[str, str | None]:
        """Have vLLM's loggers also write their last words to the directory."""
        from vllm import envs
        from vllm.logger import DEFAULT_LOGGING_CONFIG

        assert self._directory is not None
        if not envs.VLLM_CONFIGURE_LOGGING:
            return {}
        given = envs.VLLM_LOGGING_CONFIG_PATH
        if given:
            config = json.loads(Path(given).read_text())
        else:
            config = deepcopy(DEFAULT_LOGGING_CONFIG)
            level, stream = envs.VLLM_LOGGING_LEVEL, envs.VLLM_LOGGING_STREAM
            config["handlers"]["vllm"].update(level=level, stream=stream)
            config["loggers"]["vllm"]["level"] = level
        path = self._directory / "logging.json"
        path.write_text(json.dumps(logging_config(config, self._directory, os.getpid())))
        return {"VLLM_LOGGING_CONFIG_PATH": str(path)}

    # -- calls -----------------------------------------------------------------------------

    async def call(self, work: Awaitable[T], doing: str) -> T:
        """The result of a call to the engine.

        Args:
            work: the call.
            doing: what the engine is asked to do, for the error.

        Raises:
            EngineError: the engine could not, died, or took longer than ``deadlines.sync_s``.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self._watchdog is not None
        began = time.time()
        try:
            deadline = (f"{_KEY}.sync_s", self._deadlines.sync_s)
            return await self._watchdog.guard(work, doing, deadline)
        except EngineError:
            raise
        except EngineDeadError as error:
            raise await self.death() from error
        except Exception as error:  # vLLM passes a worker's error on as a bare Exception
            raise EngineError(self._cause(began) or str(error)) from error

    async def death(self, seen: str = "") -> EngineError:
        """The error that says why the engine, which is known to have died, did.

        Args:
            seen: what it was known by; said where nothing else is known.
        """
        assert self._watchdog is not None
        cause = self._cause()
        if not cause:
            await self._watchdog.wait_for_death(_LAST_WORDS_S)
            cause = self._cause() or seen
        return EngineError(obituary(self._cores, cause))

    def _end_streams(self, llm: AsyncLLM) -> None:
        """Of an engine that has died: end what still waits for its tokens. vLLM does it by itself,
        unless the engine dies before, or just when, vLLM begins to read from it."""
        from vllm.v1.engine.exceptions import EngineDeadError

        loop, end = asyncio.get_running_loop(), llm.output_processor.propagate_error
        loop.call_later(_STREAMS_S, end, EngineDeadError())

    async def check_alive(self, llm: AsyncLLM) -> None:
        """Raise what :meth:`death` says, if the engine has died already.

        Raises:
            EngineError: it has. Its processes may still be there: a core takes a while to end.
        """
        if llm.errored or any(core.exitcode is not None for core in self._cores):
            raise await self.death()

    def _end_stalled(self) -> None:
        """Kill an engine that hangs, so that all its requests end as they do when it dies."""
        limit = f"{_KEY}.stall_s={self._deadlines.stall_s:g} s"
        self._stalled = f"it had work, and sent nothing for {limit}; it was killed"
        _log.error(f"the engine hangs: {self._stalled}")
        self.kill()

    def _cause(self, since: float | None = None) -> str:
        """What the processes said, since a time or lately; may be empty."""
        since = time.time() - _LATELY_S if since is None else since
        known = "" if self._directory is None else read_cause(self._directory, since)
        return self._stalled or known

    # -- end -------------------------------------------------------------------------------

    async def close(self, llm: AsyncLLM | None) -> None:
        """End all processes. May be called twice."""
        if self._watchdog is not None:
            self._watchdog.close()
        if llm is not None:
            llm.shutdown(timeout=_SHUTDOWN_S)
        # The core's end is its workers' end, unless one of them hangs or the core was killed.
        workers, self._workers = self._workers, []
        if workers:
            await asyncio.get_running_loop().run_in_executor(None, _end, workers)
        self._cores = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """Kill all processes at once; from any thread."""
        import psutil

        for process in (*_children(self._cores), *self._workers):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for core in self._cores:
            core.kill()


def _children(cores: list[BaseProcess]) -> list[psutil.Process]:
    """All processes below the engine's cores."""
    import psutil

    found: list[psutil.Process] = []
    for core in cores:
        with suppress(psutil.NoSuchProcess):
            found += psutil.Process(core.pid).children(recursive=True)
    return found


def _end(workers: list[psutil.Process]) -> None:
    import psutil

    for worker in psutil.wait_procs(workers, timeout=_ORPHAN_S)[1]:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
