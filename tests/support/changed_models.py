"""Checkpoints made by changing a tiny one: copies with other files in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

_CONFIG_CODE = """
from transformers import Qwen3Config

class OwnConfig(Qwen3Config):
    model_type = "own"
"""

_MODEL_CODE = """
from transformers import Qwen3ForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def copy(checkpoint: Path, directory: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(checkpoint, directory)
    return directory


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; ``...`` takes one away."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def with_own_code(checkpoint: Path, directory: Path, **config: Any) -> Path:
    """The same model as a class of the checkpoint's own, whose code lies in its folder."""
    copy(checkpoint, directory)
    (directory / "configuration_own.py").write_text(_CONFIG_CODE)
    (directory / "modeling_own.py").write_text(_MODEL_CODE)
    auto_map = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    settings = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    change_json(directory / "config.json", **(settings | config))
    return directory


def with_special_tokens(checkpoint: Path, directory: Path, *tokens: str) -> Path:
    """Its tokenizer's last characters are special tokens instead, so that it has as many."""
    copy(checkpoint, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    for number, token in enumerate(tokens):
        i = len(names) - 1 - number
        vocabulary = content["model"]["vocab"]
        del vocabulary[names[i]]
        vocabulary[token] = i
        content["added_tokens"].append(
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    path.write_text(json.dumps(content))
    return directory
