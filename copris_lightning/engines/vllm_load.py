"""How full vLLM's KV cache is, as it tells after each of its steps."""

from __future__ import annotations

from typing import Any

from copris_lightning.core.cap import Load


class KVWatch:
    """Keeps the last word of each of vLLM's cores; vLLM takes it for one of its stat loggers.

    vLLM counts tokens for them, too, which costs this process some microseconds each. So it is
    asked for only where a cap follows the load.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int, float]] = {}
        self._preemptions = 0

    def __call__(self, config: Any, engine_index: int = 0) -> KVWatch:
        """vLLM makes one per core: this one is for all."""
        return self

    def load(self, inside: int) -> Load:
        """As of the last step.

        Args:
            inside: requests that have not ended by now, which bounds what it tells: an engine that
                has nothing to do makes no step.
        """
        cores = self._last.values()
        running = min(inside, sum(running for running, _, _ in cores))
        return Load(
            running=running,
            waiting=min(inside - running, sum(waiting for _, waiting, _ in cores)),
            kv_usage=sum(usage for _, _, usage in cores) / max(1, len(cores)),
            preemptions=self._preemptions,
        )

    # -- what vLLM calls -------------------------------------------------------------------

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """After a step of a core; what has nothing new is ``None``."""
        if scheduler_stats is not None:
            self._last[engine_idx] = (
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
                scheduler_stats.kv_cache_usage,
            )
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs

    def log(self) -> None:
        """Nothing to print."""

    def log_engine_initialized(self) -> None:
        """Nothing to print."""
