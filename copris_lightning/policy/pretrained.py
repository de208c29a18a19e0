"""Loading Hugging Face configs, tokenizers and models, with errors that name the YAML key."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.randomness import without_noise

KEY = "model"
TRUST_KEY = "trust_remote_code"

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config fields of models that change logits after the head, which log-probs would miss."""

_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    StrictDataclassError,
)
"""What transformers raises about files that are missing or hold something else than they should:
``{"dtype": "float31"}`` is an AttributeError, ``{"hidden_size": "x"}`` one of the hub's."""

_log = logging.getLogger(__name__)


def load_config(model: str, *, key: str = KEY, trust_remote_code: bool = False) -> Any:
    """The model's config.

    Args:
        model: path or hub name.
        key: the YAML key that names it.
        trust_remote_code: whether to run code that the checkpoint brings along; nobody is asked.

    Raises:
        ConfigurationError: there is no such model, its log-probs cannot be computed here, or it
            needs code of its own, which is not trusted or does not run.
    """
    try:
        # Never None, which asks on the terminal.
        config = AutoConfig.from_pretrained(model, trust_remote_code=bool(trust_remote_code))
    except _UNREADABLE as error:
        _refuse_code(key, model, _auto_map(model), trust_remote_code, error)
        if os.path.isdir(model):
            where = "its config cannot be read"
        else:
            where = "no folder with a checkpoint here, and the hub has no such model or cannot be "
            where += "reached"
        raise ConfigurationError(f"{key}={model!r}: {where} ({_first_line(error)})") from error
    for name in _LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigurationError(
                f"{key}={model!r} changes its logits after the head "
                f"({name}={getattr(config, name)}), which is not supported"
            )
    return config


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigurationError: the checkpoint has none, or one that needs code of its own, which is
            not trusted or does not run.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, trust_remote_code=bool(trust_remote_code)
        )
    except _UNREADABLE as error:
        auto_map = get_tokenizer_config(model).get("auto_map")
        _refuse_code(KEY, model, auto_map, trust_remote_code, error)
        raise ConfigurationError(
            f"{KEY}={model!r} has no tokenizer ({_first_line(error)})"
        ) from error
    return tokenizer


def load_model(
    model: str, *, dtype: str, attn_implementation: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The language model itself, which draws no random numbers in training mode."""
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        model,
        config=without_noise(config),
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    return loaded


def empty_model(model: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The language model without its weights, to look at its layers."""
    config = load_config(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return made


def context_length(config: Any) -> int:
    """Most tokens of prompt plus response that the model takes.

    Raises:
        ConfigurationError: its config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if length is None:
        raise ConfigurationError(
            f"{KEY}: a {type(config).__name__} names no max_position_embeddings, "
            "so lengths cannot be checked; this kind of model is not supported"
        )
    return int(length)


def embedding_rows(config: Any) -> int:
    """How many token ids the model takes, padding of its embedding included.

    Raises:
        ConfigurationError: its config does not say.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        raise ConfigurationError(
            f"{KEY}: a {type(config).__name__} names no vocab_size, so token ids cannot be "
            "checked; this kind of model is not supported"
        )
    return int(size)


def stop_token_ids(model: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The model's own ends of a response: all that its tokenizer, generation_config.json and
    config.json (that of a text model within it, too) call the end of a sequence.

    Raises:
        ConfigurationError: there are none that it can generate, so that no response could end.
    """
    named = (
        ("its tokenizer", tokenizer.eos_token_id),
        ("generation_config.json", getattr(_generation_config(model), "eos_token_id", None)),
        ("config.json", getattr(config, "eos_token_id", None)),
        ("config.json", getattr(config.get_text_config(), "eos_token_id", None)),
    )
    rows = embedding_rows(config)
    ids: set[int] = set()
    for source, value in named:
        for token in _as_list(value):
            if 0 <= token < rows:
                ids.add(token)
            else:
                _log.warning(
                    f"{KEY}={model!r}: {source} names the end-of-sequence token {token}, which "
                    f"the model cannot generate (vocab_size={rows})"
                )
    if not ids:
        raise ConfigurationError(
            f"{KEY}={model!r} has no end-of-sequence token: neither its tokenizer nor "
            "generation_config.json nor config.json names one (eos_token_id)"
        )
    return tuple(sorted(ids))


def code_files(auto_map: Any) -> str:
    """The files of a checkpoint's own code, for messages."""
    return ", ".join(sorted(set(_code_files(auto_map))))


def _generation_config(model: str) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError as error:  # a checkpoint need not have one
        if os.path.isfile(os.path.join(model, "generation_config.json")):
            raise ConfigurationError(
                f"{KEY}={model!r}: its generation_config.json cannot be read "
                f"({_first_line(error)}); mend it or take it away"
            ) from error
        return None


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(token) for token in (value if isinstance(value, (list, tuple)) else [value])]


def _auto_map(model: str) -> Any:
    try:
        return PretrainedConfig.get_config_dict(model)[0].get("auto_map")
    except OSError:
        return None


def _code_files(auto_map: Any) -> Iterator[str]:
    """``{"AutoConfig": "module.Class", "AutoTokenizer": [slow, fast]}`` names files by module."""
    for references in (auto_map or {}).values() if not isinstance(auto_map, list) else auto_map:
        for reference in references if isinstance(references, (list, tuple)) else [references]:
            if reference:
                yield f"{reference.rpartition('.')[0].rpartition('--')[2]}.py"


def _refuse_code(
    key: str, model: str, auto_map: Any, trust_remote_code: bool, error: BaseException
) -> None:
    """Say so where an error comes from a checkpoint's own code, or from its not being trusted."""
    if not auto_map:
        return
    if not trust_remote_code:
        raise ConfigurationError(
            f"{key}={model!r} needs code of its own to be run: {code_files(auto_map)}. Read it; if "
            f"you trust it, set {TRUST_KEY}=true"
        ) from error
    raise ConfigurationError(
        f"{key}={model!r}: its own code ({code_files(auto_map)}), which "
        f"{TRUST_KEY}=true runs, does not load ({_first_line(error)})"
    ) from error


def _first_line(error: BaseException) -> str:
    """A message's first line; the second, too, where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
