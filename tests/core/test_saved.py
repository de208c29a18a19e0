"""Groups saved as columns come back as they were, and what is read off the columns is true."""

import copy
import io
from array import array

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import plain, trajectory

from copris_lightning.core.outcome import Credit, Excluded, Outcome, Verdict
from copris_lightning.core.saved import SavedGroups
from copris_lightning.core.segments import Segment
from copris_lightning.core.trajectory import PromptGroup, Trajectory

SOURCES = ("engine", "trainer", "proximal")
PARTS = st.dictionaries(st.sampled_from(["format", "length", "é"]), st.floats(-1, 1))
VERDICTS = st.none() | st.builds(Verdict, st.floats(-1, 1), PARTS)
VERDICTS |= st.builds(Verdict, st.none(), PARTS, st.just("its reward is nan"))
OUTCOMES = st.none() | st.builds(Outcome, st.sampled_from(["stop", "length"]), VERDICTS)
EXCLUDED = st.none() | st.builds(Excluded, st.text(), st.booleans())
CREDITS = st.none() | st.builds(Credit, st.floats(-2, 2), EXCLUDED)
LABELS = st.tuples(st.none(), st.none()) | st.tuples(st.integers(0, 9), st.integers(0, 9))


@st.composite
def trajectories(draw, **of_group):
    """Any, also such as no run makes: without tokens, with empty columns."""
    labels = draw(st.lists(LABELS, max_size=3))
    segments = [Segment(draw(st.integers(1, 4)), *label) for label in labels]
    size = sum(segment.length for segment in segments)
    ids, values = st.integers(0, 2**31 - 1), st.floats(-50, 0, width=32)
    scored = draw(st.dictionaries(st.sampled_from(SOURCES), st.integers(0, size)))
    return Trajectory(
        **of_group,
        sample=draw(st.integers(0, 99)),
        tokens=array("i", draw(st.lists(ids, min_size=size, max_size=size))),
        segments=segments,
        logprobs={
            source: array("f", draw(st.lists(values, min_size=length, max_size=length)))
            for source, length in scored.items()
        },
        outcome=draw(OUTCOMES),
        credit=draw(CREDITS),
    )


@st.composite
def prompt_groups(draw):
    of_group = {
        "group_id": draw(st.integers(0, 2**40)),
        "prompt_id": draw(st.text(max_size=3)),
        "prompt": tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))),
        "max_new_tokens": draw(st.integers(1, 2**40)),
    }
    return PromptGroup(
        of_group["group_id"],
        draw(st.integers(0, 2**40)),
        draw(st.lists(trajectories(**of_group), min_size=1, max_size=3)),
        draw(st.none() | st.integers(0, 2**40)),
    )


def through_a_file(state):
    """What comes back from a checkpoint, with the safe default."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(prompt_groups(), max_size=4))
def test_groups_come_back_equal_and_share_nothing(groups):
    before = copy.deepcopy(groups)
    state = SavedGroups.of(groups).state_dict()
    kept = plain(state)
    for saved in (state, through_a_file(state)):
        loaded = SavedGroups.from_state(saved).groups()
        assert loaded == before
        for group in loaded:
            assert type(group.first_version) in (int, type(None))
            for row in group.trajectories:
                assert type(row.prompt) is tuple
                for column in (row.tokens, *row.logprobs.values()):
                    column.append(1)
    for row in (row for group in groups for row in group.trajectories):
        row.tokens.append(1)  # a state that lent its memory would forbid this
    assert plain(state) == kept
    assert SavedGroups.from_state(state).groups() == before


@settings(max_examples=40, deadline=None)
@given(st.lists(prompt_groups(), max_size=4))
def test_what_is_read_off_the_columns_is_what_the_trajectories_say(groups):
    saved = SavedGroups.from_state(through_a_file(SavedGroups.of(groups).state_dict()))
    rows = [row for group in groups for row in group.trajectories]
    assert saved.response_tokens == sum(row.response_length for row in rows)
    assert saved.begun == sum(row.response_length > 0 for row in rows)
    assert saved.scored == sum(row.verdict is not None for row in rows)
    for source in SOURCES:
        assert saved.lacking(source) == sum(row.missing(source) > 0 for row in rows)


def tensors(state):
    if isinstance(state, torch.Tensor):
        return 1
    items = state.values() if isinstance(state, dict) else state
    return sum(map(tensors, items)) if isinstance(state, dict | list | tuple) else 0


def test_however_many_there_are_a_file_has_as_many_tensors():
    def state(count):
        rows = (trajectory((0, [1, 2], [-1.0, -2.0]), group=i, reward=0.5) for i in range(count))
        return SavedGroups.of(PromptGroup(i, i, [row]) for i, row in enumerate(rows)).state_dict()

    assert tensors(state(1)) == tensors(state(50)) < 20
