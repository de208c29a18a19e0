"""Settings that cannot work are refused by value and YAML key."""

from __future__ import annotations

import pytest

from copris_lightning.datamodules.settings import RolloutSettings
from copris_lightning.errors import ConfigurationError

GOOD = {
    "cap": 64,
    "batch_groups": 16,
    "group_size": 8,
    "max_prompt_tokens": 100,
    "max_new_tokens": 200,
    "temperature": 1.0,
    "behavior_logprobs": "trainer",
    "max_staleness": None,
    "updates_per_batch": 1,
    "score_batch_tokens": 1024,
    "val_samples": 1,
    "val_temperature": 1.0,
    "truncated": "train",
    "overlong_cushion": 0.0,
    "drop_zero_variance": False,
    "max_dropped_groups": None,
    "max_quarantined": 0.25,
    "seed": 0,
}


def settings(**changes):
    return RolloutSettings(**(GOOD | changes))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("cap", 0, "at least 1"),
        ("cap", -3, "at least 1"),
        ("batch_groups", 0, "at least 1"),
        ("group_size", 1, "at least 2: advantages compare"),
        ("group_size", 0, "at least 2"),
        ("max_prompt_tokens", 0, "at least 1"),
        ("max_new_tokens", 0, "at least 1"),
        ("max_staleness", -1, "at least 0"),
        ("updates_per_batch", 0, "at least 1"),
        ("updates_per_batch", 17, "exceeds batch_groups=16"),
        ("score_batch_tokens", 0, "at least 1"),
        ("val_samples", 0, "at least 1"),
        ("temperature", 0.0, "above 0.*greedy"),
        ("temperature", -1.0, "above 0"),
        ("temperature", float("nan"), "above 0"),
        ("temperature", float("inf"), "finite"),
        ("val_temperature", -0.1, "at least 0"),
        ("val_temperature", float("nan"), "at least 0"),
        ("val_temperature", float("inf"), "finite"),
        ("truncated", "drop", "must be train or mask"),
        ("overlong_cushion", 1.5, "between 0 and 1"),
        ("overlong_cushion", float("nan"), "between 0 and 1"),
        ("max_quarantined", -0.1, "between 0 and 1"),
        ("max_dropped_groups", 0, "at least 1"),
        ("behavior_logprobs", "trainr", "must be trainer or engine"),
    ],
)
def test_a_value_out_of_range_is_refused_with_key_and_value(key, value, says):
    shown = repr(value) if isinstance(value, str) else str(value)
    with pytest.raises(ConfigurationError, match=f"^data.init_args.{key}={shown} .*{says}"):
        settings(**{key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict.fromkeys(("cap", "batch_groups", "max_prompt_tokens", "max_new_tokens"), 1),
        {"group_size": 2},
        {"max_staleness": 0},
        {"updates_per_batch": 16},
        {"behavior_logprobs": "engine"},
        {"temperature": 1e-3, "val_temperature": 0.0},
        {"score_batch_tokens": 1, "val_samples": 1},
    ],
)
def test_the_smallest_and_largest_values_are_allowed(changes):
    settings(**changes)


def test_prompt_and_response_that_fill_the_context_fit():
    made = settings()
    assert made.max_sequence_tokens == 300
    made.check_context(300)


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (299, "max_prompt_tokens=100 .* max_new_tokens=200 = 300 exceeds .*context of 299"),
        (200, "max_new_tokens=200 does not fit .*context of 200"),
        (100, "max_prompt_tokens=100 does not fit .*context of 100"),
    ],
)
def test_what_exceeds_the_context_is_refused_with_the_length_to_lower(context, says):
    with pytest.raises(ConfigurationError, match=f"data.init_args.{says}"):
        settings().check_context(context)
