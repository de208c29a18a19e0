"""Equal ids within a source are refused by their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from copris_testing import SomePrompts
from hypothesis import given
from hypothesis import strategies as st
from simulated_fits import build

from copris_lightning import Evaluation
from copris_lightning.datamodules.prompts.ids import check_ids
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt


@given(st.lists(st.text(max_size=3)))
def test_a_source_is_refused_exactly_where_ids_are_equal(ids):
    rows = list(enumerate(ids))
    if len(set(ids)) == len(ids):
        check_ids(rows, "task.prompts")
        return
    with pytest.raises(ConfigurationError, match=r"^task.prompts: .*not unique") as error:
        check_ids(rows, "task.prompts")
    first = next(name for name in ids if ids.count(name) > 1)
    assert f"{first!r} in rows {ids.index(first)}, " in str(error.value)


class TwiceTheSame(SomePrompts):
    """Its last prompt has the id of its third."""

    def __getitem__(self, index: int, /) -> Prompt:
        prompt = super().__getitem__(index)
        same = super().__getitem__(2).id if index == self.size - 1 else prompt.id
        return Prompt(same, text=prompt.text)


@pytest.mark.parametrize("key", ["task", "evaluations.some"])
def test_a_fit_refuses_them_before_anything_starts(
    tiny_checkpoint: Path, tmp_path: Path, key: str
) -> None:
    twice = TwiceTheSame(24)
    held: dict[str, Any] = {"prompts": twice}
    if key != "task":
        held = {"evaluations": {"some": Evaluation(twice)}}
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data=held)
    says = rf"^{key}.prompts: 1 id is not unique: 'p002' in rows 2, 23 .*columns\.id"
    with pytest.raises(ConfigurationError, match=says):
        trainer.fit(module, datamodule=data)
    assert data.session is None
    assert log == []


def test_training_and_evaluation_may_share_ids(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts = {"evaluations": {"some": Evaluation(SomePrompts(24))}}
    trainer, module, data, _ = build(tiny_checkpoint, tmp_path, data=prompts, max_steps=1)
    trainer.fit(module, datamodule=data)
