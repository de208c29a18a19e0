"""A reward that tells no responses apart is said aloud, once."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from simulated_fits import build
from some_rewards import constant, parity
from trajectories import trajectory

from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.datamodules.equal_rewards import EqualRewards
from copris_lightning.rollout.rewards import Prompt


def group(index, rewards):
    rows = [
        trajectory(
            (0, [1, 2], [0.0, 0.0]),
            group=index,
            sample=i,
            end="length" if i == 0 else "stop",
            reward=reward,
        )
        for i, reward in enumerate(rewards)
    ]
    return PromptGroup(index, index, rows)


def watcher(**settings):
    return EqualRewards(
        "ExactMatch",
        lambda ids: f"it is {len(ids)}",
        lambda i: Prompt(f"p{i}", answer=40 + i),
        **settings,
    )


def said(watch, batches):
    """The warnings after each batch."""
    found = []
    for batch in batches:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch(batch)
        found.append([str(w.message) for w in caught])
    return found


def test_the_third_batch_of_equal_rewards_is_said_with_what_is_compared_and_not_again():
    batches = [[group(2 * i, [0.0] * 4), group(2 * i + 1, [0.0] * 4)] for i in range(6)]
    counts = said(watcher(), batches)
    assert [len(found) for found in counts] == [0, 0, 1, 0, 0, 0]
    (message,) = counts[2]
    for part in (
        "task.scoring.reward: ExactMatch gave 0 to all of the 24 trajectories of the first 3",
        "6 of them reached max_new_tokens",
        "prompt 'p4' has the answer 44 and got the response 'it is 2'",
        "prompt 'p5' has the answer 45",
    ):
        assert part in message


@pytest.mark.parametrize("different", [0, 1, 2])
def test_a_single_group_whose_rewards_differ_is_enough(different):
    batches = [[group(i, [0.0, float(i == different)])] for i in range(8)]
    assert not any(said(watcher(), batches))


@pytest.mark.parametrize("missing", [math.nan, None, math.inf])
def test_what_is_quarantined_does_not_count(missing):
    assert not any(said(watcher(), [[group(i, [missing] * 3)] for i in range(5)]))
    counts = said(watcher(), [[group(i, [missing, 1.0])] for i in range(5)])
    assert [len(found) for found in counts] == [0, 0, 1, 0, 0]


def test_a_reward_of_the_prompt_alone_is_said_later():
    batches = [[group(i, [float(i % 2)] * 2)] for i in range(30)]
    counts = said(watcher(groups=20), batches)
    assert [i for i, found in enumerate(counts) if found] == [19]
    assert "ExactMatch tells no prompt's responses apart in the 40 trajectories" in counts[19][0]


@pytest.mark.parametrize(("reward", "warned"), [(constant, 1), (parity, 0)])
def test_a_fit_says_it_and_goes_on(
    tiny_checkpoint: Path, tmp_path: Path, reward: object, warned: int
) -> None:
    trainer, module, data, log = build(tiny_checkpoint, tmp_path, data={"reward": reward})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
    messages = [str(w.message) for w in caught if "equal rewards teach" in str(w.message)]
    assert len(messages) == warned
    assert all("constant gave 0.5 to all of the 24 trajectories" in text for text in messages)
    assert log.count("train") == 6
