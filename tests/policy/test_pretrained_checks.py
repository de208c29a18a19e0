"""Parts of a checkpoint that do not fit together are refused by number, before anything boots."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from changed_models import change_json, copy
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.pretrained import load_config, load_tokenizer
from copris_lightning.policy.pretrained_checks import check_pretrained, weight_shapes


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return copy(tiny_checkpoint, tmp_path / "checkpoint")


def check(checkpoint: Path) -> int:
    name = str(checkpoint)
    return check_pretrained(name, load_config(name), load_tokenizer(name))


def add_tokens(checkpoint: Path, *tokens: str, **special: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    for name, token in special.items():
        tokenizer.add_special_tokens({name: token})
    tokenizer.save_pretrained(checkpoint)
    return tokenizer


def test_a_tokenizer_that_knows_more_tokens_than_the_model_is_refused(checkpoint: Path) -> None:
    add_tokens(checkpoint, "<think>", "</think>")
    with pytest.raises(ConfigurationError) as refused:
        check(checkpoint)
    for part in (
        "100 tokens with ids up to 99",
        "an embedding for 98",
        "'<think>', '</think>'",
        "resize_token_embeddings(100)",
    ):
        assert part in str(refused.value)


def test_a_padding_token_without_an_embedding_is_refused(checkpoint: Path) -> None:
    add_tokens(checkpoint, pad_token="<pad2>")
    with pytest.raises(ConfigurationError, match="none for '<pad2>'"):
        check(checkpoint)


def test_an_enlarged_embedding_is_right_and_rows_without_a_token_are_padding(
    checkpoint: Path,
) -> None:
    tokenizer = add_tokens(checkpoint, "<think>")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(128)
    model.save_pretrained(checkpoint)
    assert check(checkpoint) == len(tokenizer) == 99


def test_a_token_for_images_needs_no_embedding_in_a_model_of_text(checkpoint: Path) -> None:
    add_tokens(checkpoint, "<image>")
    change_json(checkpoint / "tokenizer_config.json", image_token="<image>")
    tokenizer = load_tokenizer(str(checkpoint))
    assert tokenizer.image_token == "<image>"  # as Gemma 3's, whose 1B model does not see
    assert check(checkpoint) == 98


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_another_vocabulary_than_the_config_are_refused(
    checkpoint: Path, untied_checkpoint: Path, tied: bool
) -> None:
    if not tied:
        shutil.rmtree(checkpoint)
        copy(untied_checkpoint, checkpoint)
    change_json(checkpoint / "config.json", vocab_size=120)
    with pytest.raises(ConfigurationError, match=r"vocab_size=120, but .*embed_tokens.* 98 rows"):
        check(checkpoint)


def test_an_output_head_of_another_vocabulary_is_refused(
    untied_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = copy(untied_checkpoint, tmp_path / "untied")
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:90].clone()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"vocab_size=98, but lm_head\.weight .* 90 rows"):
        check(checkpoint)


def test_a_padding_id_outside_the_vocabulary_is_refused(checkpoint: Path) -> None:
    change_json(checkpoint / "config.json", pad_token_id=98)
    with pytest.raises(ConfigurationError, match="pad_token_id=98 and vocab_size=98"):
        check(checkpoint)


def test_a_model_that_is_no_language_model_is_refused(checkpoint: Path) -> None:
    change_json(checkpoint / "config.json", model_type="t5", max_position_embeddings=512)
    with pytest.raises(ConfigurationError, match="is a 't5', which is no causal language model"):
        check(checkpoint)


# -- the weights' files --------------------------------------------------------------------


def shard(checkpoint: Path) -> dict[str, list[int]]:
    """Split its weights over two files, with an index."""
    whole = weight_shapes(str(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    places = {}
    for part, some in enumerate((names[:5], names[5:])):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, checkpoint / file)
        places.update(dict.fromkeys(some, file))
    (checkpoint / "model.safetensors").unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return whole


def test_shapes_are_read_from_one_file_and_from_several(checkpoint: Path) -> None:
    whole = shard(checkpoint)
    assert whole["model.embed_tokens.weight"] == [98, 64]
    assert weight_shapes(str(checkpoint)) == whole
    assert check(checkpoint) == 98


def test_a_missing_file_of_several_is_named(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"2 files, of which model-00002.* is missing"):
        check(checkpoint)


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="holds no weights: neither model"):
        check(checkpoint)
    (checkpoint / "pytorch_model.bin").touch()  # is left to those who load it
    assert check(checkpoint) == 98


@pytest.mark.parametrize("left", [0, 7, 100, 20_000])
def test_a_file_that_was_cut_is_named(checkpoint: Path, left: int) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ConfigurationError, match=r"model\.safetensors is broken \(.*copy it again"):
        check(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"index\.json is no index of weights"):
        check(checkpoint)


def test_weights_on_the_hub_are_not_looked_at() -> None:
    assert weight_shapes("some/model-that-is-not-in-the-cache") == {}
