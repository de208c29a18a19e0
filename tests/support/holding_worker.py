"""The part of :mod:`holding` that vLLM's worker imports (and nobody else)."""

from __future__ import annotations

from typing import Any

from holding import hold

from copris_lightning.engines.vllm_worker import CoprisWorkerExtension

hold("boot")


class HoldingExtension(CoprisWorkerExtension):
    """Holds in the second load of weights, or in a forward pass after the first."""

    _copris_loads = 0

    def load_shard(self, path: str) -> None:
        if self._copris_loads == 1:
            hold("sync")
        super().load_shard(path)

    def end_shards(self) -> dict[str, Any]:
        report = super().end_shards()
        self._copris_loads += 1
        if self._copris_loads == 1:
            self._hold_in_forward_passes()
        return report

    def _hold_in_forward_passes(self) -> None:
        runner = self.model_runner
        execute, passes = runner.execute_model, 0

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            nonlocal passes
            passes += 1
            if passes == 20:
                hold("stage")
            return execute(*args, **kwargs)

        runner.execute_model = execute_model
