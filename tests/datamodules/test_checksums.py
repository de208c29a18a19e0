"""A change of anything that was saved is noticed, and nothing else."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from copris_lightning.datamodules.checksums import refuse_changed, with_checksums
from copris_lightning.errors import ConfigurationError

STATE: dict[str, Any] = {
    "numbers": {"int32": torch.arange(5, dtype=torch.int32), "none": torch.empty(0)},
    "rows": (torch.tensor([[0.5, math.nan], [-0.0, 1.0]]), torch.tensor([True, False])),
    "scalar": torch.tensor(3.0),
    "plain": [1, True, None, 0.1, math.inf, "\ud800 and é", [], {"a": [2, 3]}],
    "version": 7,
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def test_what_was_saved_comes_through_a_file_whatever_stands_beside_it() -> None:
    refuse_changed({**through_a_file(with_checksums(STATE)), "mine": torch.ones(3)})


def changed(value: Any) -> Iterator[Any]:
    """Everything that differs from a value in one place."""
    if isinstance(value, torch.Tensor):
        for i in range(value.numel()):
            other = value.clone()
            other.view(-1).view(torch.uint8)[i * value.element_size()] ^= 1
            yield other
        yield value.reshape(1, *value.shape)
        yield value.to(torch.float64)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from ({**value, key: other} for other in changed(item))
            yield {k: v for k, v in value.items() if k != key}
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            for other in changed(item):
                yield type(value)([*value[:i], other, *value[i + 1 :]])
            yield value[:i] + value[i + 1 :]
        yield list(value) if isinstance(value, tuple) else tuple(value)
    else:
        yield [value]
        yield value + " " if isinstance(value, str) else str(value)
        if isinstance(value, bool):
            yield int(value)


@pytest.mark.parametrize("name", STATE)
def test_any_change_is_refused_by_the_name_of_its_part(name: str) -> None:
    saved = through_a_file(with_checksums(STATE))
    others = list(changed(saved[name]))
    assert len(others) > 1
    for other in others:
        with pytest.raises(ConfigurationError, match=rf"\({name} changed\): go on from another"):
            refuse_changed({**saved, name: other})
