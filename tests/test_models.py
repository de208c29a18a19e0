"""Architectures, each trained for two batches on the real engine: the table in docs/models.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from architectures import REFUSED, TRAINED, tiny_architecture
from builders import small_data, small_module
from copris_testing import SomePrompts
from some_rewards import ShareOfDigits

from copris_lightning import CoprisModule, VLLMEngine, WeightSync
from copris_lightning.errors import ConfigurationError
from copris_lightning.weights.files import FilesTransport
from copris_lightning.weights.transport import Run, Transport

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


class ShardedEngine(VLLMEngine):
    """A vLLM engine whose weights come in many shards, cut anywhere."""

    def transport(self, rank: int, run: Run) -> Transport:
        return FilesTransport(self, None, rank, run, shard_bytes=20_000)


@pytest.mark.models
@pytest.mark.parametrize("name", TRAINED)
def test_an_architecture_trains_on_the_real_engine(
    name: str, cpu_engine_args: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = tiny_architecture(name, tmp_path)
    module = small_module(checkpoint, lr=0.5)
    data = small_data(
        checkpoint,
        ShardedEngine(cpu_engine_args),
        prompts=SomePrompts(),
        reward=ShareOfDigits(),
        groups=2,
        group_size=4,
    )
    sync = WeightSync(parity_sequences=8)
    weights: list[dict[str, torch.Tensor]] = []

    class Keep(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            weights.append({n: t.clone() for n, t in pl_module.named_weights()})

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            weights.append({n: t.clone() for n, t in pl_module.named_weights()})

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[sync, Keep()],
    )
    trainer.fit(module, datamodule=data)
    assert sync.version == 2
    before, after = weights
    # Experts that no token was sent to have no gradient.
    still = [n for n in before if torch.equal(before[n], after[n]) and ".experts." not in n]
    print(f"{name}: parity {sync.worst_parity:.1e}")
    assert not still
    assert sync.worst_parity < 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_is_refused_by_name(name: str, tmp_path: Path) -> None:
    checkpoint = tiny_architecture(name, tmp_path)
    with pytest.raises(ConfigurationError, match=re.escape(REFUSED[name])):
        CoprisModule(str(checkpoint))


def test_the_page_has_a_row_for_each() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]+) \|$", PAGE.read_text(), re.M)
    outcomes = dict(rows)
    assert len(rows) == len(outcomes) >= 12
    assert set(outcomes) == {*TRAINED, *REFUSED}
    for name in TRAINED:
        figure = re.fullmatch(r"parity (\d\.\de-\d\d)", outcomes[name])
        assert figure is not None, name
        assert float(figure[1]) < 1e-4
    for name, reason in REFUSED.items():
        assert outcomes[name] == f"refused: `{reason}`"
