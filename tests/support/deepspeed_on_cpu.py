"""What DeepSpeed needs to train on a CPU under Lightning, with ``DS_ACCELERATOR=cpu`` set."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy


class CPUForDeepSpeed(CUDAAccelerator):
    """CPU devices, for a strategy that asks for a CUDA accelerator and uses nothing of it."""

    def setup_device(self, device: torch.device) -> None:
        import deepspeed

        # It would compile this all-reduce, which only inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def setup(self, trainer: L.Trainer) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        return [torch.device("cpu", i) for i in devices]

    @staticmethod
    def is_available() -> bool:
        return True


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """ZeRO on gloo. Stage 3 splits every weight at all times, as it does only large ones else."""

    def __init__(self, stage: int, **options: Any) -> None:
        super().__init__(stage=stage, process_group_backend="gloo", **options)
        if stage == 3:
            self.config["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 0,
            }
