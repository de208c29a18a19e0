"""Trajectories are append-only, and their parallel fields stay parallel."""

import json
import math
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copris_lightning.core.trajectory import TRUNCATED, PromptGroup, Segment, Trajectory

LIMIT = 12


def make(limit=LIMIT):
    return Trajectory(4, 1, "p", (7, 8), limit)


@st.composite
def responses(draw):
    """Up to LIMIT tokens with their log-probs and non-decreasing versions."""
    size = draw(st.integers(0, LIMIT))
    tokens = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    logprobs = draw(st.lists(st.floats(-50, 0), min_size=size, max_size=size))
    versions = sorted(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
    return list(zip(tokens, logprobs, versions, strict=True))


def append_in_chunks(trajectory, response, cuts=()):
    """Append by version, cut further wherever ``cuts`` says; repeated cuts make empty chunks."""
    starts = [i for i in range(1, len(response)) if response[i][2] != response[i - 1][2]]
    bounds = sorted([0, *starts, *(min(c, len(response)) for c in cuts), len(response)])
    for a, b in pairwise(bounds):
        chunk = response[a:b]
        version = chunk[0][2] if chunk else 0
        trajectory.append([t for t, _, _ in chunk], [p for _, p, _ in chunk], version)


@settings(max_examples=150, deadline=None)
@given(responses(), st.lists(st.integers(0, LIMIT), max_size=8))
def test_chunks_cut_anywhere_are_the_same_as_one(response, cuts):
    whole, cut = make(), make()
    append_in_chunks(whole, response)
    append_in_chunks(cut, response, cuts)
    assert cut == whole


@settings(max_examples=100, deadline=None)
@given(responses())
def test_a_segment_is_a_run_of_one_version(response):
    trajectory = make()
    append_in_chunks(trajectory, response, range(LIMIT))
    runs = [
        (version, [token for token, _, _ in run])
        for version, run in groupby(response, key=lambda item: item[2])
    ]
    assert [(s.version, s.token_ids) for s in trajectory.segments] == runs
    assert trajectory.is_mixed == (len(runs) > 1)


@settings(max_examples=100, deadline=None)
@given(responses())
def test_concatenated_fields_are_aligned_token_by_token(response):
    trajectory = make()
    append_in_chunks(trajectory, response)
    assert trajectory.response_token_ids == [token for token, _, _ in response]
    assert trajectory.behavior_logprobs("engine") == [value for _, value, _ in response]
    assert trajectory.versions == [version for _, _, version in response]
    assert trajectory.response_length == len(response)
    assert trajectory.remaining_tokens == LIMIT - len(response)


@settings(max_examples=150, deadline=None)
@given(
    responses(),
    st.lists(st.integers(0, 9), max_size=LIMIT + 2),
    st.sampled_from([0, 0, 0, 1, -1]),
    st.integers(0, 5),
)
def test_a_chunk_that_does_not_fit_is_refused_and_changes_nothing(response, tokens, more, version):
    trajectory, count = make(), max(0, len(tokens) + more)
    append_in_chunks(trajectory, response)
    before = trajectory.state_dict()
    last = response[-1][2] if response else 0
    misfit = len(tokens) != count or (
        tokens and (len(response) + len(tokens) > LIMIT or version < last)
    )
    if misfit:
        with pytest.raises(ValueError, match="trajectory 1 of prompt 'p'"):
            trajectory.append(tokens, [-1.0] * count, version)
        assert trajectory.state_dict() == before
    else:
        trajectory.append(tokens, [-1.0] * count, version)
        assert trajectory.response_token_ids == [t for t, _, _ in response] + tokens


def test_a_version_older_than_the_last_segment_is_refused():
    trajectory = make()
    trajectory.append([1], [-1.0], 1)
    trajectory.append([2], [-1.0], 3)
    with pytest.raises(ValueError, match="version 2 follows version 3"):
        trajectory.append([3], [-1.0], 2)


def test_more_logprobs_than_tokens_are_refused_even_without_tokens():
    with pytest.raises(ValueError, match="0 tokens came with 2 log-probs"):
        make().append([], [-1.0, -1.0], 0)


def test_the_limit_can_be_met_and_not_passed():
    trajectory = make(limit=3)
    trajectory.append([1, 2, 3], [-1.0] * 3, 0)
    assert trajectory.remaining_tokens == 0
    with pytest.raises(ValueError, match=r"3 \+ 1 tokens exceed the limit of 3"):
        trajectory.append([4], [-1.0], 0)


def test_a_finished_trajectory_takes_no_more_tokens():
    trajectory = make()
    trajectory.finish_reason = "stop"
    trajectory.append([], [], 0)
    with pytest.raises(ValueError, match="finished"):
        trajectory.append([1], [-1.0], 0)


@settings(max_examples=150, deadline=None)
@given(responses(), st.lists(st.integers(0, LIMIT), max_size=5))
def test_the_trainer_scores_each_token_once_and_never_again(response, stages):
    """Score after each stage, under weights whose log-probs name the stage and the token."""
    trajectory, expected, done = make(), [], 0
    for stage, end in enumerate([*sorted(min(s, len(response)) for s in stages), len(response)]):
        append_in_chunks(trajectory, response[done:end])
        assert trajectory.unscored_tokens() == end - done
        if done < end:
            with pytest.raises(ValueError, match="not scored"):
                trajectory.behavior_logprobs("trainer")
        trajectory.set_trainer_logprobs([-(100 * stage + i) for i in range(end)])
        expected += [-(100 * stage + i) for i in range(done, end)]
        done = end
        assert trajectory.behavior_logprobs("trainer") == expected
        assert trajectory.unscored_tokens() == 0
    assert trajectory.behavior_logprobs("engine") == [value for _, value, _ in response]


def test_a_segment_that_grows_after_scoring_keeps_its_first_values():
    trajectory = make()
    trajectory.append([1, 2], [-1.0, -1.0], 3)
    trajectory.set_trainer_logprobs([-0.1, -0.2])
    trajectory.append([3], [-1.0], 3)
    trajectory.set_trainer_logprobs([-9.0, -9.0, -0.3])
    assert trajectory.segments == [Segment(3, [1, 2, 3], [-1.0] * 3, [-0.1, -0.2, -0.3])]


@pytest.mark.parametrize("count", [1, 3])
def test_trainer_logprobs_of_another_length_are_refused(count):
    trajectory = make()
    trajectory.append([1, 2], [-1.0, -1.0], 0)
    with pytest.raises(ValueError, match=f"{count} log-probs for 2 tokens"):
        trajectory.set_trainer_logprobs([-0.5] * count)
    assert trajectory.unscored_tokens() == 2


@settings(max_examples=80, deadline=None)
@given(
    responses(),
    st.integers(0, LIMIT),
    st.sampled_from([None, "stop", "length"]),
    st.none() | st.floats(-1, 1),
)
def test_a_saved_trajectory_comes_back_equal_and_shares_nothing(response, scored, reason, reward):
    trajectory = make()
    append_in_chunks(trajectory, response[:scored])
    trajectory.set_trainer_logprobs([-0.25] * len(response[:scored]))
    append_in_chunks(trajectory, response[scored:])
    trajectory.finish_reason, trajectory.reward, trajectory.advantage = reason, reward, reward
    trajectory.excluded = None if reason == "stop" else "truncated"
    trajectory.proximal_logprobs = [-0.5] * len(response)
    state = trajectory.state_dict()
    for loaded in (Trajectory.from_state(state), Trajectory.from_state(json_copy(state))):
        assert loaded == trajectory
        assert type(loaded.prompt_token_ids) is tuple
        for segment in loaded.segments:
            segment.token_ids.append(1)
            segment.logprobs.append(-1.0)
            segment.trainer_logprobs.append(-1.0)
    assert trajectory.state_dict() == state
    assert Trajectory.from_state(state) == trajectory


def test_a_trajectory_saved_before_it_knew_of_exclusion_is_still_read():
    state = make().state_dict()
    del state["proximal_logprobs"], state["excluded"]
    assert Trajectory.from_state(state) == make()


def test_only_what_is_not_finite_is_quarantined():
    trajectory = make()
    assert not trajectory.is_quarantined
    trajectory.excluded = TRUNCATED
    assert not trajectory.is_quarantined
    trajectory.excluded = "its reward is nan"
    assert trajectory.is_quarantined


NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)


def scored():
    """Three tokens of two versions, all of it finite."""
    trajectory = make()
    trajectory.append([1, 2], [-1.0, -2.0], 0)
    trajectory.append([3], [-3.0], 1)
    trajectory.set_trainer_logprobs([-1.5, -2.5, -3.5])
    trajectory.proximal_logprobs = [-0.5, -0.25, -0.125]
    trajectory.reward = 1.0
    return trajectory


def test_a_trajectory_of_finite_numbers_is_finite():
    assert scored().not_finite() is None
    assert make().not_finite() is None  # neither scored nor rewarded yet


def test_its_name_tells_it_from_every_other():
    assert make().name == "trajectory 1 of prompt 'p' (group 4)"


@NOT_FINITE
def test_a_reward_that_is_not_finite_is_named(value):
    trajectory = scored()
    trajectory.reward = value
    assert trajectory.not_finite() == f"its reward is {value}"


@NOT_FINITE
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_logprob_that_is_not_finite_is_named_with_whose_it_is_and_where(position, value):
    """Positions count through the whole response, over all segments."""
    segment, offset = divmod(position, 2)
    for field, whose in (("logprobs", "the engine's"), ("trainer_logprobs", "the trainer's")):
        trajectory = scored()
        getattr(trajectory.segments[segment], field)[offset] = value
        expected = f"{whose} log-prob of token {position} is {value}"
        assert trajectory.not_finite() == expected
    trajectory = scored()
    trajectory.proximal_logprobs[position] = value
    expected = f"the proximal policy's log-prob of token {position} is {value}"
    assert trajectory.not_finite() == expected


def json_copy(state):
    return json.loads(json.dumps(state))


def test_a_saved_group_comes_back_equal():
    group = PromptGroup(4, 17, [make(), make()], first_version=2)
    group.trajectories[0].append([1], [-1.0], 2)
    assert PromptGroup.from_state(json_copy(group.state_dict())) == group


def test_rewards_of_a_group_are_in_sample_order_and_all_there():
    group = PromptGroup(4, 0, [make(), make()])
    group.trajectories[1].reward = 1.0
    with pytest.raises(ValueError, match="group 4 is not scored"):
        _ = group.rewards
    # A reward of zero is a reward.
    group.trajectories[0].reward = 0.0
    assert group.rewards == [0.0, 1.0]
