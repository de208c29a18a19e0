"""What is read of a pretrained checkpoint: its ends of a response, and code of its own."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from changed_models import change_json, copy, with_own_code

from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.pretrained import (
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    stop_token_ids,
)
from copris_lightning.policy.pretrained_checks import check_pretrained


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return copy(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", ask)


def stops(checkpoint: Path, config: Any = None) -> tuple[int, ...]:
    name = str(checkpoint)
    return stop_token_ids(name, config or load_config(name), load_tokenizer(name))


@pytest.mark.parametrize("eos", [[1, 7, 9], 9, [9]])
def test_ends_that_only_the_config_has_are_ends(checkpoint: Path, eos: Any) -> None:
    (checkpoint / "generation_config.json").unlink()
    change_json(checkpoint / "config.json", eos_token_id=eos)
    assert stops(checkpoint) == tuple(sorted({1, *(eos if isinstance(eos, list) else [eos])}))


def test_ends_of_all_files_count(checkpoint: Path) -> None:
    change_json(checkpoint / "generation_config.json", eos_token_id=[5, 1])
    change_json(checkpoint / "config.json", eos_token_id=7)
    assert stops(checkpoint) == (1, 5, 7)
    change_json(checkpoint / "tokenizer_config.json", eos_token=None)
    assert stops(checkpoint) == (1, 5, 7)
    change_json(checkpoint / "generation_config.json", eos_token_id=None)
    assert stops(checkpoint) == (7,)


def test_ends_of_a_text_model_within_another_count(checkpoint: Path) -> None:
    text = SimpleNamespace(eos_token_id=[11, 12], vocab_size=98)
    whole = SimpleNamespace(eos_token_id=13, get_text_config=lambda: text)
    assert stops(checkpoint, whole) == (1, 11, 12, 13)


def test_ends_that_cannot_be_generated_are_left_out_aloud(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "generation_config.json").unlink()
    change_json(checkpoint / "config.json", eos_token_id=[1, 50256])
    assert stops(checkpoint) == (1,)
    assert "50256, which the model cannot generate (vocab_size=98)" in caplog.text
    change_json(checkpoint / "config.json", eos_token_id=None)
    change_json(checkpoint / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigurationError, match="has no end-of-sequence token: neither"):
        stops(checkpoint)


def test_a_generation_config_that_cannot_be_read_is_not_passed_over(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": 5')
    with pytest.raises(ConfigurationError, match=r"generation_config\.json cannot be read"):
        stops(checkpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float31"}, "float31"),
        ({"hidden_size": "many"}, "'hidden_size'.*expected int, got str"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": ...}, "model_type"),
    ],
)
def test_a_config_that_cannot_be_read_is_an_error_that_says_what_is_wrong(
    checkpoint: Path, change: Any, says: str
) -> None:
    change_json(checkpoint / "config.json", **change)
    with pytest.raises(ConfigurationError, match=f"^model='.*{says}"):
        load_config(str(checkpoint))


# -- code of its own -----------------------------------------------------------------------


@pytest.fixture
def own(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return with_own_code(tiny_checkpoint, tmp_path / "own")


def test_code_of_its_own_is_refused_by_the_names_of_its_files(own: Path) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_config(str(own))
    assert "configuration_own.py, modeling_own.py" in str(refused.value)
    assert "trust_remote_code=true" in str(refused.value)
    assert "no folder" not in str(refused.value)


def test_code_that_is_trusted_is_run_for_all_parts(own: Path) -> None:
    trusted: Any = {"trust_remote_code": True}
    config = load_config(str(own), **trusted)
    assert type(config).__name__ == "OwnConfig"
    tokenizer = load_tokenizer(str(own), **trusted)
    assert check_pretrained(str(own), config, tokenizer, **trusted) == 98
    loaded = load_model(str(own), dtype="float32", attn_implementation="sdpa", **trusted)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert empty_model(str(own), **trusted).device == torch.device("meta")


def test_a_tokenizer_with_code_of_its_own_is_refused_by_name(checkpoint: Path) -> None:
    change_json(
        checkpoint / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ConfigurationError, match=r"run: tokenization_own\.py\. .*trust_remote_cod"):
        load_tokenizer(str(checkpoint))


@pytest.mark.parametrize("code", ["import a_package_that_is_not_there", None])
def test_trusted_code_that_does_not_load_is_named(own: Path, code: str | None) -> None:
    file = own / "configuration_own.py"
    if code is None:
        file.unlink()
    else:
        file.write_text(f"{code}\n{file.read_text()}")
    with pytest.raises(ConfigurationError, match=r"configuration_own\.py.*does not load \(.+\)"):
        load_config(str(own), trust_remote_code=True)


def test_code_that_is_not_needed_is_left_alone_aloud(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_json(
        checkpoint / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.Qwen3ForCausalLM"}
    )
    name = str(checkpoint)
    check_pretrained(name, load_config(name), load_tokenizer(name))
    assert "(modeling_x.py), which is not run: transformers' own qwen3 is used" in caplog.text
