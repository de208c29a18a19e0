"""A worker that fails, for tests that ask for the reason; vLLM's worker imports it."""

from __future__ import annotations

from typing import Any

from copris_lightning.engines.vllm_worker import CoprisWorkerExtension


class FailingExtension(CoprisWorkerExtension):
    """After its first sync, forward passes raise."""

    def end_shards(self) -> dict[str, Any]:
        report = super().end_shards()

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            raise ArithmeticError("a kernel has no answer")

        self.model_runner.execute_model = execute_model
        return report
