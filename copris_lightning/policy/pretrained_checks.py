"""What the parts of a pretrained checkpoint say of each other, compared before anything boots.

Tokenizer, config and weights are files that people change one at a time. Where they disagree, it
shows late and far away: as an index error in the trainer, or in an engine's process.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerBase

from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.pretrained import KEY, TRUST_KEY, code_files, embedding_rows

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight")
"""Ends of the names of weights with a row per token id, in most architectures. Others are left to
those who load them."""
_OTHER_INPUTS = ("image_token", "audio_token", "video_token")
"""Tokenizers' attributes that name tokens which stand for something else than text. Text models
share a tokenizer with their siblings that see, and have no embedding for these (Gemma 3 1B)."""

_log = logging.getLogger(__name__)


def check_reference(config: Any, reference: Any, name: str) -> None:
    """Refuse a reference policy of other tokens.

    Args:
        config: of the policy.
        reference: its own.
        name: path or hub name, for the message.

    Raises:
        ConfigurationError: names the sizes of both vocabularies.
    """
    theirs, ours = embedding_rows(reference), embedding_rows(config)
    if theirs != ours:
        raise ConfigurationError(
            f"estimator.kl.reference={name!r} has a vocabulary of {theirs} tokens, the model has "
            f"{ours}"
        )


def check_pretrained(
    model: str, config: Any, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> int:
    """Refuse a checkpoint whose parts do not fit together.

    Args:
        model: path or hub name; of what is only on the hub, weights are not looked at.
        config: its config.
        tokenizer: its tokenizer.
        trust_remote_code: whether its own code is run.

    Returns:
        the size of the vocabulary that both know: token ids below it can be generated and read.

    Raises:
        ConfigurationError: names the numbers or files that do not fit.
    """
    auto_map = getattr(config, "auto_map", None) or {}
    has_code = trust_remote_code and "AutoModelForCausalLM" in auto_map
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_code:
        raise ConfigurationError(
            f"{KEY}={model!r} is a {config.model_type!r}, which is no causal language model"
        )
    if auto_map and not trust_remote_code:
        _log.warning(
            f"{KEY}={model!r} brings code of its own ({code_files(auto_map)}), which is not run: "
            f"transformers' own {config.model_type} is used; {TRUST_KEY}=true would run it"
        )
    rows = embedding_rows(config)
    padding = getattr(config.get_text_config(), "pad_token_id", None)
    if padding is not None and not -rows <= padding < rows:
        raise ConfigurationError(
            f"{KEY}={model!r}: config.json says pad_token_id={padding} and vocab_size={rows}"
        )
    known = _check_tokenizer(model, tokenizer, rows)
    if getattr(config, "quantization_config", None) is None:  # those pack their weights
        _check_tables(model, weight_shapes(model), rows)
    return known


def _check_tokenizer(model: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Refuse tokens without an embedding. (Rows without a token are padding, and common.)"""
    ids = tokenizer.get_vocab()
    other = {getattr(tokenizer, name, None) for name in _OTHER_INPUTS}
    missing = sorted((i, token) for token, i in ids.items() if i >= rows and token not in other)
    if missing:
        names = ", ".join(repr(token) for _, token in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        highest = missing[-1][0]
        raise ConfigurationError(
            f"{KEY}={model!r}: its tokenizer has {len(ids)} tokens with ids up to {highest}, but "
            f"the model has an embedding for {rows} (config.json's vocab_size), none for {names}"
            f"{more}. Enlarge it by model.resize_token_embeddings({highest + 1}) and save the "
            "model, or take the tokens out of the tokenizer"
        )
    return min(max(ids.values()) + 1, rows)


def _check_tables(model: str, shapes: dict[str, list[int]], rows: int) -> None:
    """Refuse weights that do not have the config's vocabulary."""
    for end in _TABLES:
        tables = {name: shape for name, shape in shapes.items() if f".{name}".endswith(f".{end}")}
        # A model that sees has other tables, too.
        if tables and all(shape[0] != rows for shape in tables.values()):
            name, shape = next(iter(tables.items()))
            raise ConfigurationError(
                f"{KEY}={model!r}: config.json says vocab_size={rows}, but {name} in its weights "
                f"has {shape[0]} rows; save model and config together"
            )


def weight_shapes(model: str) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint's weights, from the headers of its safetensors files.

    Returns:
        nothing for weights in another format, or on the hub and not in its cache.

    Raises:
        ConfigurationError: there are no weights, a file of them is missing, or is broken.
    """
    if not os.path.isdir(model):
        return _shapes(model, _cached_files(model))
    folder = Path(model)
    if (folder / _INDEX).is_file():
        files = [folder / name for name in _shards(model, folder / _INDEX)]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise ConfigurationError(
                f"{KEY}={model!r}: {_INDEX} names {len(files)} files, of which "
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
            )
        return _shapes(model, files)
    if (folder / _SINGLE).is_file():
        return _shapes(model, [folder / _SINGLE])
    if not any((folder / name).is_file() for name in _PICKLED):
        raise ConfigurationError(
            f"{KEY}={model!r} holds no weights: neither {_SINGLE} nor {_INDEX} nor {_PICKLED[0]}"
        )
    return {}


def _cached_files(model: str) -> list[Path]:
    """The weights' files that the hub's cache has; none if it does not have them all."""
    index = try_to_load_from_cache(model, _INDEX)
    names = _shards(model, Path(index)) if isinstance(index, str) else [_SINGLE]
    files = [try_to_load_from_cache(model, name) for name in names]
    found = [Path(path) for path in files if isinstance(path, str)]
    return found if len(found) == len(files) else []


def _shards(model: str, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{KEY}={model!r}: {index.name} is no index of weights ({error!r})"
        ) from error


def _shapes(model: str, files: Iterable[Path]) -> dict[str, list[int]]:
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    shapes[name] = file.get_slice(name).get_shape()
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(
                f"{KEY}={model!r}: {path.name} is broken ({error}); copy it again"
            ) from error
    return shapes
