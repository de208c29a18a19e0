"""Whatever file is given as a checkpoint: it loads as it was saved, or is refused by its name."""

from __future__ import annotations

import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from copris_testing import SomePrompts
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from simulated_fits import build

from copris_lightning import Evaluation
from copris_lightning.__main__ import main
from copris_lightning.datamodules.checkpoint_file import check_file, read
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.lora import LoRA
from copris_lightning.quickstart.warm_start import tiny_model

SIZES = {"groups": 2, "max_new_tokens": 8, "cap": 6}


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run of one batch."""
    directory = tmp_path_factory.mktemp("saved")
    trainer, module, data, _ = build(tiny_checkpoint, directory, data=SIZES, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(directory / "good.ckpt")
    return directory / "good.ckpt"


def refused(file: Path, checkpoint: Path, directory: Path, **options: Any) -> str:
    """Why a fit does not go on from a file; the engine is not booted for that."""
    data = {**SIZES, **options.pop("data", {})}
    trainer, module, datamodule, log = build(
        checkpoint, directory, data=data, max_steps=2, **options
    )
    with pytest.raises(ConfigurationError) as error:
        trainer.fit(module, datamodule, ckpt_path=file)
    assert str(file) in str(error.value)
    assert log == []
    assert datamodule.session is None
    assert datamodule.engine.closed == 0
    return str(error.value)


def text(path: Path) -> None:
    path.write_text("epoch: 3\nloss: 0.1\n" * 100)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def state_dict(path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, path)


def foreign_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}}))


def foreign_objects(path: Path) -> None:
    torch.save({"pytorch-lightning_version": "2", "model": torch.nn.Linear(2, 2)}, path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "there is no such"),
        (lambda path: path.touch(), "it is empty"),
        (lambda path: path.mkdir(), "a directory that holds no checkpoint"),
        (text, "it is no checkpoint"),
        (foreign_pickle, "it is no checkpoint"),
        (other_zip, "another zip archive"),
        (state_dict, "no checkpoint of Lightning"),
        (foreign_objects, "more than tensors and plain values.*weights_only=False"),
    ],
    ids=str,
)
def test_what_is_no_checkpoint_is_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    file = tmp_path / "some.ckpt"
    make(file)
    message = refused(file, tiny_checkpoint, tmp_path)
    assert re.search(reason, message), message


def test_a_file_cut_at_any_place_is_refused(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    cut = tmp_path / "cut.ckpt"
    places = [1, 3, 4, 100, *(len(content) * i // 20 for i in range(1, 20)), len(content) - 1]
    for place in places:
        cut.write_bytes(content[:place])
        with pytest.raises(ConfigurationError, match=r"cut\.ckpt.* cannot be gone on from"):
            check_file(cut)


def is_refused(file: Path) -> bool:
    try:
        check_file(file)
        read(file, weights_only=False)
    except ConfigurationError as error:
        return file.name in str(error)
    return False


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_a_file_with_any_byte_flipped_is_refused_or_loads_as_it_was(
    saved: Path, tmp_path: Path
) -> None:
    content = saved.read_bytes()
    expected = torch.load(saved, weights_only=True)
    flipped = tmp_path / "flipped.ckpt"
    draw = random.Random(0)
    # The directory of the archive is at its end; it gets as many as all the rest.
    places = [draw.randrange(len(content)) for _ in range(100)]
    places += [len(content) - 1 - draw.randrange(len(content) // 20) for _ in range(100)]
    caught = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        flipped.write_bytes(changed)
        if is_refused(flipped):
            caught += 1
        else:
            assert equal(torch.load(flipped, weights_only=True), expected), place
    assert caught > 100


def test_a_checkpoint_in_parts_with_a_byte_flipped_is_refused(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    weights = {f"w{i}": torch.randn(64, 8) for i in range(4)}
    checkpoint.save({"state_dict": weights}, checkpoint_id=tmp_path, no_dist=True)
    torch.save({"pytorch-lightning_version": "2"}, tmp_path / "meta.pt")
    check_file(tmp_path)
    for file in (*tmp_path.glob("*.distcp"), tmp_path / "meta.pt"):
        content = file.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 16
        for broken in (changed, content[: len(content) // 2]):
            file.write_bytes(broken)
            with pytest.raises(ConfigurationError, match=file.name):
                check_file(tmp_path)
        file.unlink()
        with pytest.raises(ConfigurationError, match=str(tmp_path)):
            check_file(tmp_path)
        file.write_bytes(content)
    check_file(tmp_path)


def edited(saved: Path, path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(saved, weights_only=True)
    edit(content)
    torch.save(content, path)
    return path


def another_token(content: dict[str, Any]) -> None:
    tokens, _ = content["RolloutDataModule"]["buffer"]["groups"]["tokens"]
    tokens[0] += 1


def without_trace(content: dict[str, Any]) -> None:
    state = content["RolloutDataModule"]
    del state["data"], state["checksums"]["data"]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda c: c.pop("optimizer_states"), "weights only"),
        (lambda c: c.pop("RolloutDataModule"), "no rollout of a RolloutDataModule"),
        (lambda c: c["RolloutDataModule"].pop("layout"), "has layout 1"),
        (lambda c: c["RolloutDataModule"].pop("buffer"), "(buffer is missing): go on from another"),
        (lambda c: c["RolloutDataModule"].pop("checksums"), "(checksums are missing)"),
        (without_trace, "not one of this version"),
        (another_token, "(buffer changed): go on from another checkpoint (--ckpt_path)"),
        (lambda c: c["RolloutDataModule"].update(position=1), "(position changed)"),
        (lambda c: c.pop("state_dict"), "no weights"),
    ],
    ids=[
        *("weights only", "other data", "older", "no buffer", "no checksums", "no data", "a token"),
        *("its place", "no weights"),
    ],
)
def test_a_checkpoint_of_which_a_part_is_gone_or_another_is_refused(
    saved: Path, tiny_checkpoint: Path, tmp_path: Path, edit: Any, reason: str
) -> None:
    file = edited(saved, tmp_path / "lacking.ckpt", edit)
    assert reason in refused(file, tiny_checkpoint, tmp_path)


def test_a_file_that_only_lightning_reads_is_refused_by_its_name_as_well(
    saved: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = edited(saved, tmp_path / "elsewhere.ckpt", another_token)
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data=SIZES, max_steps=2)
    with pytest.raises(ConfigurationError, match=r"file://.*elsewhere\.ckpt.*buffer changed"):
        trainer.fit(module, data, ckpt_path=f"file://{file}")
    assert log == []


def test_another_models_checkpoint_is_refused(
    saved: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    wide = tiny_model(tmp_path / "wide", hidden_size=128, layers=2)
    assert "another model's: policy.model.model.embed_tokens" in refused(saved, wide, tmp_path)
    deep = tiny_model(tmp_path / "deep", hidden_size=64, layers=3)
    assert "lacks policy.model.model.layers.2" in refused(saved, deep, tmp_path)
    flat = tiny_model(tmp_path / "flat", hidden_size=64, layers=1)
    assert "has policy.model.model.layers.1" in refused(saved, flat, tmp_path)
    adapters = {"lora": LoRA(rank=2)}
    message = refused(saved, tiny_checkpoint, tmp_path, model=adapters)
    assert "lacks policy.model.model.layers.0" in message
    assert "with lora has" in message


def test_evaluation_takes_weights_and_looks_at_the_file_as_well(
    saved: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = edited(saved, tmp_path / "weights.ckpt", lambda c: c.pop("optimizer_states"))
    data = {**SIZES, "evaluations": {"val": Evaluation(SomePrompts(3))}}
    trainer, module, datamodule, _ = build(tiny_checkpoint, tmp_path, data=data)
    trainer.validate(module, datamodule=datamodule, ckpt_path=file, verbose=False)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigurationError, match=r"weights\.ckpt.*cut short"):
        trainer.validate(module, datamodule=datamodule, ckpt_path=file, verbose=False)


def test_a_refusal_does_not_write_over_the_file_that_was_refused(
    saved: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    saver = OnExceptionCheckpoint(tmp_path)
    shutil.copy(saved, saver.ckpt_path)
    before = saved.read_bytes()
    refused(
        Path(saver.ckpt_path),
        tiny_checkpoint,
        tmp_path,
        data={"seed": 1},
        callbacks=[saver],
        enable_checkpointing=True,
    )
    assert Path(saver.ckpt_path).read_bytes() == before


def test_the_command_line_says_it_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[2] / "configs/simulated.yaml"
    file = tmp_path / "cut.ckpt"
    file.write_bytes(b"PK\x03\x04 and no more")
    status = main(
        [
            *("fit", "--config", str(config), "--ckpt_path", str(file)),
            *("--model.init_args.model", str(tiny_checkpoint)),
            *("--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"),
        ]
    )
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"copris: ckpt_path={str(file)!r} cannot be gone on from: it is cut")
