"""A data set is known again, and what is not as it was is named."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copris_lightning.datamodules.identity import DataIdentity
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.task import QueuedPrompt


def queue(*prompts: Prompt) -> list[QueuedPrompt]:
    return [QueuedPrompt(p, i, tuple(map(ord, p.text or ""))) for i, p in enumerate(prompts)]


def rows(*names: str) -> list[Prompt]:
    return [Prompt(name, text=f"what is {name}?", answer=name.upper()) for name in names]


def difference(before: list[Prompt], now: list[Prompt]) -> str | None:
    return DataIdentity.of(queue(*now)).difference(DataIdentity.of(queue(*before)), queue(*now))


BEFORE = rows("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (rows("a", "b", "c", "d"), None),
        (rows("new", "a", "b", "c", "d"), "'new' (row 0) is new"),
        (rows("a", "b", "c", "d", "e"), "there are 5: prompt 'e' (row 4) and those after it"),
        (rows("a", "b"), "there were 4 prompts, and there are 2"),
        (rows("a", "c", "d"), "in the place of prompt 'c' (row 1) is gone"),
        (rows("b", "a", "c", "d"), "prompt 'b' (row 0) was number 1"),
        (rows("a", "b", "x", "d"), "prompt 'x' (row 2) is not what it was"),
        ([], "there were 4 prompts, and there are 0"),
    ],
    ids=str,
)
def test_the_first_prompt_that_is_not_what_it_was_is_named(
    now: list[Prompt], message: str | None
) -> None:
    found = difference(BEFORE, now)
    assert found == message if message is None else message in str(found)


def test_other_tokens_of_the_same_text_are_told_apart() -> None:
    now = queue(*BEFORE)
    now[2] = dataclasses.replace(now[2], token_ids=(1, 2))
    found = DataIdentity.of(now).difference(DataIdentity.of(queue(*BEFORE)), now)
    assert found is not None
    assert "'c' (row 2) has other tokens: another tokenizer, chat template" in found


def test_rows_that_are_left_out_count_too() -> None:
    before = queue(*BEFORE)
    now = [dataclasses.replace(queued, index=queued.index + 1) for queued in before]
    found = DataIdentity.of(now).difference(DataIdentity.of(before), now)
    assert found is not None
    assert "stand in other rows" in found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (1, "1"),
        (0.0, -0.0),
        (None, "None"),
        ("a", b"a"),
        ([1, [2]], [[1], 2]),
        (["a", "b"], ["ab"]),
        ({"a": {"b": 1}}, {"a": {"b": 2}}),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        (float("nan"), float("inf")),
        (datetime.date(2024, 1, 2), datetime.date(2024, 2, 1)),
        (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
        (np.array([1, 2]), np.array([1.0, 2.0])),
        (np.arange(5000), np.arange(5000) + (np.arange(5000) == 2500)),
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (Prompt("x", answer=1), Prompt("x", answer=2)),
    ],
    ids=str,
)
def test_different_values_differ_and_equal_ones_do_not(one: Any, other: Any) -> None:
    for column in ("answer", "extra"):
        prompts = [
            Prompt("x", **{column: {"k": v} if column == "extra" else v}) for v in (one, other)
        ]
        assert difference(prompts[:1], prompts[1:]) is not None
        assert difference(prompts[:1], prompts[:1]) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.randoms())
def test_any_json_value_is_known_again_however_its_objects_are_ordered(
    value: Any, random: Any
) -> None:
    def shuffled(item: Any) -> Any:
        if isinstance(item, dict):
            keys = list(item)
            random.shuffle(keys)
            return {key: shuffled(item[key]) for key in keys}
        return [shuffled(part) for part in item] if isinstance(item, list) else item

    before = DataIdentity.of(queue(Prompt("x", answer=value)))
    now = queue(Prompt("x", answer=shuffled(value)))
    assert DataIdentity.of(now).difference(before, now) is None
    assert before.opaque == ()


def test_values_without_a_canonical_form_are_left_out_and_said() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for value in (io.StringIO("a"), object(), cycle):
        identity = DataIdentity.of(queue(Prompt("x", extra={"v": value})))
        assert len(identity.opaque) == 1
    assert DataIdentity.of(queue(Prompt("x", answer=object()))).opaque == ("builtins.object",)


def test_a_state_survives_the_safe_loader() -> None:
    identity = DataIdentity.of(queue(*BEFORE))
    file = io.BytesIO()
    torch.save(identity.state_dict(), file)
    file.seek(0)
    loaded = DataIdentity.from_state(torch.load(file, weights_only=True))
    assert identity.difference(loaded, queue(*BEFORE)) is None
    assert sum(t.nbytes for t in identity.state_dict().values()) == 16 * len(BEFORE) + 8
