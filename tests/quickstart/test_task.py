"""The quickstart's task: what its teacher writes is right without mistakes, and has a long tail."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from copris_lightning.quickstart.task import (
    MAX_QUOTIENT,
    DivisionPrompts,
    DivisionReward,
    demonstration,
    max_response_length,
)
from copris_lightning.quickstart.warm_start import CONTEXT
from copris_lightning.rollout.rewards import Prompt

ROOT = Path(__file__).parents[2]


@given(st.integers(0, 2**40), st.integers(1, 200), st.floats(0.0, 3.0))
def test_a_faultless_demonstration_is_right_and_no_longer_than_said(
    seed: int, most: int, tail: float
) -> None:
    prompt = DivisionPrompts(4, seed, most, tail)[seed % 4]
    assert prompt.text is not None
    dividend, divisor = prompt.text.removesuffix("=").split("%")
    assert int(str(prompt.answer)) == int(dividend[::-1]) % int(divisor)
    text = demonstration(prompt, random.Random(seed), 0.0)
    assert DivisionReward()(text, prompt) == 1.0
    assert len(text) <= max_response_length(most)
    steps = text.split("#")[0].split(";")[:-1]
    left = [int(dividend[::-1]), *(int(step[::-1]) for step in steps)]
    assert all(a - b == int(divisor) for a, b in pairwise(left))


def test_the_longest_of_many_is_more_than_six_times_the_mean() -> None:
    rng = random.Random(0)
    lengths = [len(demonstration(p, rng, 0.0)) for p in DivisionPrompts(4096, 1)]
    assert max(lengths) > 6 * statistics.fmean(lengths)


def test_a_careless_pupil_goes_on_from_what_he_wrote_and_is_often_wrong() -> None:
    prompts = DivisionPrompts(512, 3)
    rng, reward = random.Random(0), DivisionReward()
    rewards = [reward(demonstration(p, rng, 0.1), p) for p in prompts]
    assert 0.5 < statistics.fmean(rewards) < 0.8
    assert demonstration(Prompt("p", text="5%5="), random.Random(0), 0.0) == "0;#0."


@pytest.mark.parametrize(
    "response", ["", "#3", "#4.", "84;#3.#3.", "84;#3.;", "#three.", "84;93;03;12;21;3;"]
)
def test_what_does_not_state_the_remainder_once_earns_nothing(response: str) -> None:
    prompt = Prompt("p", text="75%9=", answer="3")
    assert DivisionReward()("84;93;03;12;21;3;#3.", prompt) == 1.0
    assert DivisionReward()(response, prompt) == 0.0


@pytest.mark.parametrize(
    "arguments",
    [{"size": 0}, {"max_quotient": 0}, {"tail": -1.0}, {"tail": float("nan")}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_is_out_of_range_is_named(arguments: dict[str, Any]) -> None:
    [(name, value)] = arguments.items()
    with pytest.raises(ValueError, match=rf"{name} is {value}.*set {name}"):
        DivisionPrompts(**arguments)


def test_the_config_has_room_for_the_longest_answer() -> None:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    task = config["data"]["init_args"]["task"]
    limit, prompt = task["sampling"]["max_new_tokens"], task["max_prompt_tokens"]
    assert max_response_length(MAX_QUOTIENT) < limit <= CONTEXT - prompt
