"""What a reward may return: numbers of every kind, and nothing else."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_rewards import DoesWhatItIsTold

from copris_lightning.errors import RewardError
from copris_lightning.rollout.reward_process import Failure, _verdict, as_number
from copris_lightning.rollout.rewards import Prompt, RewardScorer, Scoring


class Grade(IntEnum):
    GOOD = 1


class Colour(Enum):
    RED = 1


class Whole(int):
    pass


class Index:
    def __index__(self) -> int:
        return 3


class Rude:
    def __repr__(self) -> str:
        raise ValueError("no")

    def item(self) -> float:
        raise SystemExit(1)


NUMBERS = [
    *(True, False, 0, -3, 2.5, Whole(4), Grade.GOOD, Fraction(1, 4), Decimal("0.5"), Index()),
    *(
        np.bool_(True),
        np.float32(0.5),
        np.float16(2),
        np.int64(-7),
        np.uint8(3),
        np.longdouble(1.5),
    ),
    *(np.array(0.5), np.array([0.25]), np.array([[1]]), np.array(True), np.array(2, dtype=object)),
    *(torch.tensor(0.5), torch.tensor([2]), torch.tensor(True), torch.tensor(1.5).bfloat16()),
    torch.tensor(0.75, requires_grad=True) * 2,
]
NO_VERDICT = [None, math.nan, np.float32("nan"), torch.tensor(math.nan), Decimal("NaN")]
INFINITE = [math.inf, -math.inf, np.float64("inf"), torch.tensor(-math.inf), Decimal("Infinity")]
NO_NUMBERS = [
    *(
        "1.0",
        "",
        b"1.0",
        bytearray(b"1"),
        memoryview(b"1"),
        1j,
        complex(1, 0),
        [1.0],
        (),
        {},
        {1.0},
    ),
    *(object(), float, Colour.RED, 10**400, Fraction(10**400), Rude(), lambda: 1.0),
    *(np.array([1.0, 2.0]), np.array([]), np.complex64(1), np.clongdouble(1), np.str_("1.0")),
    *(np.array("1.0"), np.array(b"1"), np.array("1.0", dtype=object), np.datetime64("2026-01-01")),
    *(
        torch.tensor([1.0, 2.0]),
        torch.tensor([]),
        torch.tensor(1j),
        torch.tensor(1.0, device="meta"),
    ),
]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: f"{type(value).__name__} {value}")
def test_every_kind_of_number_is_one(value):
    expected = 3.0 if isinstance(value, Index) else float(getattr(value, "item", lambda: value)())
    assert (as_number(value), type(as_number(value))) == (expected, float)


@pytest.mark.parametrize("value", NO_VERDICT, ids=repr)
def test_no_verdict_is_nan(value):
    assert math.isnan(as_number(value))


@pytest.mark.parametrize("value", INFINITE, ids=repr)
def test_infinities_are_passed_on_for_the_trajectory_to_be_quarantined(value):
    assert math.isinf(as_number(value))


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_anything_else_is_refused_and_shown(value):
    verdict = _verdict(value)
    assert isinstance(verdict, Failure)
    assert verdict.text.endswith(", not a number")
    assert isinstance(verdict.exception(), BaseException)
    shown = "<a Rude>" if isinstance(value, Rude) else repr(value)[:100]
    assert verdict.text.startswith(f"returned {shown}")
    assert len(verdict.text) < 300


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
plain |= st.decimals() | st.fractions() | st.complex_numbers() | st.dates() | st.timedeltas()
anything = st.recursive(
    plain, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner)
)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_whatever_comes_is_a_float_or_a_failure_that_shows_it(value):
    verdict = _verdict(value)
    if isinstance(verdict, Failure):
        assert not isinstance(value, float | bool | type(None))
        assert repr(value)[:100] in verdict.text
    else:
        assert type(verdict) is float
        assert value is None or not isinstance(value, str | bytes | complex | list | dict | tuple)


@settings(deadline=None)
@given(st.floats(allow_nan=False, width=32), st.sampled_from(["numpy", "array", "torch"]))
def test_a_number_keeps_its_value_whatever_holds_it(number, holder):
    made = {"numpy": np.float32, "array": np.array, "torch": torch.tensor}[holder]
    assert as_number(made(number)) == number


@settings(deadline=None)
@given(st.integers(min_value=-(2**62), max_value=2**62))
def test_integers_too(number):
    assert as_number(number) == as_number(np.int64(number)) == as_number(torch.tensor(number))


def test_it_is_converted_in_the_worker_and_the_error_names_prompt_and_value():
    scorer = RewardScorer(Scoring(DoesWhatItIsTold()))

    async def several():
        expressions = (
            "__import__('fractions').Fraction(1, 4)",
            "__import__('numpy').float32(0.5)",
            "type('Local', (), {'__float__': lambda self: 0.125})()",  # cannot be sent
        )
        return [await scorer(f"value {e}", Prompt("p", text="")) for e in expressions]

    assert asyncio.run(several()) == [0.25, 0.5, 0.125]
    for expression, says in (("'good'", "'good'"), ("[1.0, 0.0]", r"\[1.0, 0.0\]")):
        with pytest.raises(RewardError, match=f"prompt 'sum-7' returned {says}, not a number"):
            asyncio.run(scorer(f"value {expression}", Prompt("sum-7", text="")))
    scorer.close()
