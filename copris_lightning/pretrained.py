"""Loading Hugging Face configs, tokenizers and models, with errors that name the YAML key."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from copris_lightning.errors import ConfigurationError
from copris_lightning.randomness import without_noise

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config fields of models that change logits after the head, which log-probs would miss."""


def load_config(model: str, *, key: str = "model.init_args.model") -> Any:
    """The model's config.

    Args:
        model: path or hub name.
        key: the YAML key that names it.

    Raises:
        ConfigurationError: there is no such model, or its log-probs cannot be computed here.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{key}={model!r}: no folder with a checkpoint here, and the hub has "
            f"no such model or cannot be reached ({_first_line(error)})"
        ) from error
    for name in _LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigurationError(
                f"{key}={model!r} changes its logits after the head "
                f"({name}={getattr(config, name)}), which is not supported"
            )
    return config


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigurationError: the checkpoint has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"model.init_args.model={model!r} has no tokenizer ({_first_line(error)})"
        ) from error
    return tokenizer


def load_model(model: str, *, dtype: str, attn_implementation: str) -> PreTrainedModel:
    """The language model itself, which draws no random numbers in training mode."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model,
        config=without_noise(AutoConfig.from_pretrained(model)),
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    return loaded


def empty_model(model: str) -> PreTrainedModel:
    """The language model without its weights, to look at its layers."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(model))
    return made


def context_length(config: Any) -> int:
    """Most tokens of prompt plus response that the model takes.

    Raises:
        ConfigurationError: its config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ConfigurationError(
            f"model.init_args.model: a {type(config).__name__} names no max_position_embeddings, "
            "so lengths cannot be checked; this kind of model is not supported"
        )
    return int(length)


def stop_token_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's and the generation config's.

    Raises:
        ConfigurationError: there are none, so that no response could end.
    """
    ids: set[int] = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    try:
        eos = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # a checkpoint need not have one
        eos = None
    ids.update([eos] if isinstance(eos, int) else eos or [])
    if not ids:
        raise ConfigurationError(f"model.init_args.model={model!r} has no end-of-sequence token")
    return tuple(sorted(ids))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
