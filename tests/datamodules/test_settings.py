"""Settings that cannot work are refused where they are made, by name and value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from copris_testing import SomePrompts
from some_rewards import parity

from copris_lightning import BatchSize, Credit, Evaluation, Flow, Sampling, Scoring, Task
from copris_lightning.core.cap import Cap
from copris_lightning.datamodules.settings import RolloutSettings
from copris_lightning.errors import ConfigurationError

WHOLE = {
    Sampling: Sampling(max_new_tokens=200),
    Task: Task(
        SomePrompts(4), Scoring(parity), Sampling(max_new_tokens=200), max_prompt_tokens=100
    ),
    Flow: Flow(),
    BatchSize: BatchSize(),
    Credit: Credit(),
    Evaluation: Evaluation(SomePrompts(4)),
    RolloutSettings: RolloutSettings(Task(SomePrompts(4), Scoring(parity))),
}
NAN, INF = float("nan"), float("inf")


def settings(evaluation: Evaluation | None = None) -> RolloutSettings:
    task: Any = WHOLE[Task]
    return RolloutSettings(task, evaluations={"some": evaluation} if evaluation else {})


@pytest.mark.parametrize(
    ("cls", "name", "value", "says"),
    [
        (Flow, "cap", 0, "at least 1"),
        (Flow, "cap", -3, "at least 1"),
        (Flow, "cap", "most", "must be auto"),
        (Flow, "max_staleness", -1, "at least 0"),
        (Flow, "behavior_logprobs", "trainr", "must be auto or trainer or engine"),
        (BatchSize, "groups", 0, "at least 1"),
        (BatchSize, "group_size", 1, "at least 2: advantages compare"),
        (BatchSize, "group_size", 0, "at least 2"),
        (BatchSize, "updates", 0, "at least 1"),
        (BatchSize, "updates", 17, "exceeds groups=16"),
        (BatchSize, "score_tokens", 0, "at least 1"),
        (Task, "max_prompt_tokens", 0, "at least 1"),
        (Sampling, "max_new_tokens", 0, "at least 1"),
        (Sampling, "temperature", -0.1, "at least 0"),
        (Sampling, "temperature", NAN, "at least 0"),
        (Sampling, "temperature", INF, "finite"),
        (Sampling, "top_p", 0.0, "above 0 and at most 1"),
        (Sampling, "top_k", -1, "at least 0"),
        (Credit, "truncated", "drop", "must be train or mask"),
        (Credit, "overlong_cushion", 1.5, "between 0 and 1"),
        (Credit, "overlong_cushion", NAN, "between 0 and 1"),
        (Credit, "max_quarantined", -0.1, "between 0 and 1"),
        (Credit, "max_dropped_groups", 0, "at least 1"),
        (Evaluation, "samples", 0, "at least 1"),
        (Evaluation, "on", "fit", "must be validate or test or predict"),
        (Evaluation, "pass_threshold", NAN, "a finite number"),
        (RolloutSettings, "seed", -1, "from 0"),
        (RolloutSettings, "seed", 2**32, "from 0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_name_and_value(
    cls: type, name: str, value: Any, says: str
) -> None:
    shown = repr(value) if isinstance(value, str) else str(value)
    with pytest.raises(ConfigurationError, match=f"^{name}={shown} .*{says}"):
        replace(WHOLE[cls], **{name: value})


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (Sampling(0.0), r"^sampling\.temperature=0.0 must be above 0.*greedy"),
        (Sampling(top_p=0.9), r"^sampling\.top_p=0.9 must be 1 in training"),
        (Sampling(top_k=5), r"^sampling\.top_k=5 must be 0 in training"),
    ],
)
def test_training_draws_from_the_whole_distribution(sampling: Sampling, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Task(SomePrompts(4), Scoring(parity), sampling)
    Evaluation(SomePrompts(4), sampling=sampling)


def test_what_an_object_holds_is_named_from_it_on() -> None:
    with pytest.raises(ConfigurationError, match=r"^evaluations: 'a b' must be a name"):
        RolloutSettings(settings().task, evaluations={"a b": Evaluation(SomePrompts(4))})
    many = Evaluation(SomePrompts(4), samples=10**12)
    with pytest.raises(ConfigurationError, match=r"^evaluations\.some\.samples=10+: .*fit"):
        settings(many)


def test_the_smallest_and_largest_values_are_allowed() -> None:
    Flow(cap=1, max_staleness=0, behavior_logprobs="engine")
    BatchSize(groups=1, group_size=2, updates=1, score_tokens=1)
    BatchSize(groups=16, updates=16)
    Sampling(temperature=1e-3, max_new_tokens=1).check_training()
    Evaluation(SomePrompts(1), samples=1, sampling=Sampling(0.0))


def test_prompt_and_response_that_fill_the_context_fit() -> None:
    assert settings().max_sequence_tokens == 300
    settings().check_model(300, vocabulary=9)


@pytest.mark.parametrize(
    ("context", "says"),
    [
        (
            299,
            r"task\.max_prompt_tokens=100 .* task\.sampling\.max_new_tokens=200 = 300 exceeds",
        ),
        (200, r"task\.sampling\.max_new_tokens=200 does not fit .*context of 200"),
        (100, r"task\.max_prompt_tokens=100 does not fit .*context of 100"),
    ],
)
def test_what_exceeds_the_context_is_refused_with_the_length_to_lower(
    context: int, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{says}"):
        settings().check_model(context, vocabulary=9)


def test_an_evaluation_samples_as_training_unless_it_says_otherwise() -> None:
    own = Sampling(0.5)
    assert settings(Evaluation(SomePrompts(4))).sampling("some") == settings().task.sampling
    assert settings(Evaluation(SomePrompts(4), sampling=own)).sampling("some") == own


def test_a_cap_is_a_number_or_bounds() -> None:
    assert Flow(cap=7).bounds == Cap(7, 7)
    assert Flow(cap="auto").bounds == Cap()
    assert Flow(cap=Cap(2, 9)).bounds == Cap(2, 9)
    with pytest.raises(ConfigurationError, match=r"^cap\.most=1000000000000: .* lower it"):
        Flow(cap=Cap(1, 10**12))
