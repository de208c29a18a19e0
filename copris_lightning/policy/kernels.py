"""Liger's kernels (https://github.com/linkedin/Liger-Kernel) in place of a model's own layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from copris_lightning.errors import ConfigurationError


def check_liger(config: Any) -> None:
    """Refuse a model or a machine without Liger's kernels, before anything is loaded.

    Raises:
        ConfigurationError: says what is missing.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ConfigurationError(
            f"precision.liger=true needs the package liger-kernel ({error}); install it, or set it "
            "to false"
        ) from error
    if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigurationError(
            f"precision.liger=true: Liger has no kernels for model type {config.model_type}; set "
            "it to false"
        )
    if not torch.cuda.is_available():
        raise ConfigurationError(
            "precision.liger=true: Liger's kernels run on GPUs, and there is none; set it to false"
        )


def apply_liger(model: PreTrainedModel) -> None:
    """Compute norms, rotary positions and MLPs with Liger's kernels; weights keep their names.

    Its fused losses are left out: log-probs are computed from the last layer's outputs, chunk by
    chunk (:mod:`copris_lightning.core.logprobs`).
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)
