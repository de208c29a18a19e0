"""Trajectories are append-only, and their columns stay parallel."""

import copy
import math
import sys
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import trajectory, versions

from copris_lightning.core.outcome import TRUNCATED, Credit, Excluded, Verdict
from copris_lightning.core.segments import Segment, Span
from copris_lightning.core.trajectory import PromptGroup, Trajectory

LIMIT = 12
SOURCES = ("engine", "trainer", "proximal")


def make(limit=LIMIT):
    return Trajectory(4, 1, "p", (7, 8), limit)


@st.composite
def responses(draw, min_size=0):
    """Up to LIMIT tokens with their log-probs and non-decreasing versions."""
    size = draw(st.integers(min_size, LIMIT))
    tokens = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    logprobs = draw(st.lists(st.floats(-50, 0, width=32), min_size=size, max_size=size))
    labels = sorted(draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)))
    return list(zip(tokens, logprobs, labels, strict=True))


def append_in_chunks(made, response, cuts=()):
    """Append by version, cut further wherever ``cuts`` says; repeated cuts make empty chunks."""
    starts = [i for i in range(1, len(response)) if response[i][2] != response[i - 1][2]]
    bounds = sorted([0, *starts, *(min(c, len(response)) for c in cuts), len(response)])
    for a, b in pairwise(bounds):
        chunk = response[a:b]
        version = chunk[0][2] if chunk else 0
        made.append([t for t, _, _ in chunk], [p for _, p, _ in chunk], version)


def read(made):
    return list(zip(made.tokens, made.column("engine"), versions(made), strict=True))


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
    made = make()
    append_in_chunks(made, response, range(LIMIT))
    runs = [(len(list(run)), v) for v, run in groupby(v for _, _, v in response)]
    assert made.segments == [Segment(length, v, v) for length, v in runs]
    assert made.written_tokens == made.response_length


@settings(max_examples=100, deadline=None)
@given(responses())
def test_columns_are_aligned_token_by_token(response):
    made = make()
    append_in_chunks(made, response)
    assert read(made) == response
    assert made.sequence.tolist() == [7, 8, *(token for token, _, _ in response)]
    assert made.response_length == len(response)
    assert made.remaining_tokens == LIMIT - len(response)


@settings(max_examples=150, deadline=None)
@given(
    responses(),
    st.lists(st.integers(0, 9), max_size=LIMIT + 2),
    st.sampled_from([0, 0, 0, 1, -1]),
    st.integers(0, 5),
)
def test_a_chunk_that_does_not_fit_is_refused_and_changes_nothing(response, tokens, more, version):
    made, count = make(), max(0, len(tokens) + more)
    append_in_chunks(made, response)
    before = copy.deepcopy(made)
    last = response[-1][2] if response else 0
    misfit = len(tokens) != count or (
        tokens and (len(response) + len(tokens) > LIMIT or version < last)
    )
    if misfit:
        with pytest.raises(ValueError, match="trajectory 1 of prompt 'p'"):
            made.append(tokens, [-1.0] * count, version)
        assert made == before
    else:
        made.append(tokens, [-1.0] * count, version)
        assert made.tokens.tolist() == [t for t, _, _ in response] + tokens


def test_a_version_older_than_the_last_segment_or_than_its_keys_and_values_is_refused():
    made = make()
    made.append([1], [-1.0], 1)
    made.append([2], [-1.0], 3, 1)
    made.observe([5])
    assert made.segments == [Segment(1, 1, 1), Segment(1, 3, 1), Segment(1, None, None)]
    with pytest.raises(ValueError, match="version 2 follows version 3"):
        made.append([3], [-1.0], 2)
    with pytest.raises(ValueError, match="version 3 attended to keys and values of version 4"):
        made.append([3], [-1.0], 3, 4)


def test_more_logprobs_than_tokens_are_refused_even_without_tokens():
    with pytest.raises(ValueError, match="0 tokens came with 2 log-probs"):
        make().append([], [-1.0, -1.0], 0)


@pytest.mark.parametrize("first", [None, [-1.0]])
def test_log_probs_come_with_all_chunks_or_with_none(first):
    made = make()
    made.observe([9])
    made.append([1], first, 0)
    with pytest.raises(ValueError, match="some of its chunks only"):
        made.append([2], [-1.0] if first is None else None, 0)
    made.append([2], first, 0)
    assert ("engine" in made.logprobs) == (first is not None)


def test_the_limit_can_be_met_and_not_passed():
    made = make(limit=3)
    made.append([1, 2, 3], [-1.0] * 3, 0)
    assert made.remaining_tokens == 0
    for add in (lambda: made.append([4], [-1.0], 0), lambda: made.observe([4])):
        with pytest.raises(ValueError, match=r"3 \+ 1 tokens exceed the limit of 3"):
            add()


def test_a_finished_trajectory_takes_no_more_tokens():
    made = make()
    with pytest.raises(ValueError, match="scored before it is finished"):
        made.judge(Verdict(1.0))
    made.finish("stop")
    made.append([], [], 0)
    made.observe([])
    for add in (lambda: made.append([1], [-1.0], 0), lambda: made.observe([1])):
        with pytest.raises(ValueError, match="finished"):
            add()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), responses(1)), max_size=4), st.booleans())
def test_observations_keep_columns_parallel_and_count_for_no_version(parts, logprobs):
    made, tokens, labels, last = make(10**3), [], [], 0
    for is_observed, response in parts:
        ids = [token for token, _, _ in response]
        if is_observed:
            made.observe(ids)
        else:
            last += response[0][2]
            made.append(ids, [-1.0] * len(ids) if logprobs else None, last)
        tokens += ids
        labels += [None if is_observed else last] * len(ids)
    assert made.tokens.tolist() == tokens
    assert versions(made) == labels
    assert made.written_tokens == sum(label is not None for label in labels)
    if "engine" in made.logprobs:
        expected = [0.0 if label is None else -1.0 for label in labels]
        assert made.column("engine").tolist() == expected
    else:
        assert not logprobs or not made.written_tokens


@settings(max_examples=200, deadline=None)
@given(responses(), st.integers(0, LIMIT), st.data())
def test_labels_are_only_ever_raised_from_where_the_stream_began(response, start, data):
    made, start = make(), min(start, len(response))
    append_in_chunks(made, response)
    before = copy.deepcopy(made)
    count = len(response) - start
    told = sorted(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    spans = [Span(len(list(run)), v, v // 2) for v, run in groupby(told)]
    old = versions(made)
    if any(new < was for new, was in zip(told, old[start:], strict=True)):
        with pytest.raises(ValueError, match=r"version \d is labelled \d|follows version"):
            made.relabel(start, spans)
        assert made == before
        return
    made.relabel(start, spans)
    assert versions(made) == old[:start] + told
    assert versions(made) == sorted(versions(made))
    assert all(a != b for a, b in pairwise(made.segments))
    kv = [s.kv_version for s in made.segments for _ in range(s.length)]
    assert kv == old[:start] + [v // 2 for v in told]
    made.segments = before.segments
    assert made == before


@pytest.mark.parametrize(
    ("start", "spans"),
    [
        (0, [Span(3, 5, 5)]),
        (1, [Span(4, 5, 5)]),
        (-1, [Span(5, 5, 5)]),
        (0, [Span(4, 5, 5), Span(0, 6, 6)]),
        (0, [Span(2, 6, 6), Span(2, 5, 5)]),
        (0, [Span(4, 5, 6)]),
    ],
    ids=["too few", "too many", "before the start", "empty", "falling", "kv"],
)
def test_spans_that_do_not_fit_are_refused_and_change_nothing(start, spans):
    made = trajectory((0, [1, 2], [-1.0] * 2), (3, [1, 2], [-1.0] * 2))
    before = copy.deepcopy(made)
    with pytest.raises(ValueError, match="trajectory 0 of prompt 'p0'"):
        made.relabel(start, spans)
    assert made == before


def test_a_label_never_falls_on_an_observation_and_may_come_after_the_end():
    made = make()
    made.append([1], None, 0)
    made.observe([2])
    made.append([3, 4], None, 1)
    with pytest.raises(ValueError, match="an observation is labelled 2"):
        made.relabel(0, [Span(4, 2, 2)])
    made.finish("stop")
    made.relabel(2, [Span(1, 1, 0), Span(1, 4, 0)])
    assert versions(made) == [0, None, 1, 4]


@settings(max_examples=150, deadline=None)
@given(responses(), st.lists(st.integers(0, LIMIT), max_size=5))
def test_the_trainer_scores_each_token_once_and_never_again(response, stages):
    """Score after each stage, under weights whose log-probs name the stage and the token."""
    made, expected, done = make(), [], 0
    for stage, end in enumerate([*sorted(min(s, len(response)) for s in stages), len(response)]):
        append_in_chunks(made, response[done:end])
        assert made.missing("trainer") == end - done
        if done < end:
            with pytest.raises(ValueError, match=f"{end - done} of {end} tokens have none of the"):
                made.column("trainer")
        made.add_logprobs("trainer", [-(100 * stage + i) for i in range(end)])
        expected += [-(100 * stage + i) for i in range(done, end)]
        done = end
        assert made.column("trainer").tolist() == expected
        assert made.missing("trainer") == 0
    assert read(made) == response


@pytest.mark.parametrize("count", [1, 3])
def test_logprobs_of_another_length_are_refused(count):
    made = trajectory((0, [1, 2], [-1.0, -1.0]))
    with pytest.raises(ValueError, match=f"{count} log-probs for 2 tokens"):
        made.add_logprobs("trainer", [-0.5] * count)
    assert made.missing("trainer") == 2
    assert "trainer" not in made.logprobs


def test_a_token_of_a_long_trajectory_takes_at_most_sixteen_bytes():
    """With the engine's and the trainer's log-probs, over many chunks, stages and versions."""
    tokens = 20_000
    made = make(tokens)
    for start in range(0, tokens, 8):
        made.append([150_000 + start] * 8, [-1.5] * 8, start // 5_000)
        if start % 4_000 == 0:
            made.add_logprobs("trainer", [-1.25] * made.response_length)
    made.add_logprobs("trainer", [-1.25] * tokens)
    held = [made, made.tokens, made.logprobs, *made.logprobs.values(), made.segments]
    assert sum(map(sys.getsizeof, [*held, *made.segments])) / tokens <= 16


def test_only_what_is_not_finite_is_quarantined():
    made = make()
    assert not made.is_quarantined
    assert made.excluded is None
    made.credit = Credit(0.0)
    assert not made.is_quarantined
    made.credit = Credit(0.0, TRUNCATED)
    assert made.excluded is TRUNCATED
    assert not made.is_quarantined
    made.credit = Credit(0.0, Excluded("its reward is nan"))
    assert made.is_quarantined


NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)


def scored(reward=1.0):
    """Three tokens of two versions, all of it finite."""
    made = trajectory((0, [1, 2], [-1.0, -2.0]), (1, [3], [-3.0]), reward=reward)
    made.add_logprobs("trainer", [-1.5, -2.5, -3.5])
    made.add_logprobs("proximal", [-0.5, -0.25, -0.125])
    return made


def test_a_trajectory_of_finite_numbers_has_no_fault():
    assert scored().fault() is None
    assert make().fault() is None  # neither scored nor rewarded yet


def test_its_name_tells_it_from_every_other():
    assert make().name == "trajectory 1 of prompt 'p' (group 4)"


@NOT_FINITE
def test_a_reward_that_is_not_finite_is_a_fault(value):
    made = scored(value)
    assert made.reward is None
    assert made.fault() == f"its reward is {value}"
    with pytest.raises(ValueError, match="not finite"):
        Verdict(value)


def test_a_verdict_has_a_reward_or_a_fault():
    for arguments in ({"reward": None}, {"reward": 1.0, "fault": "no"}):
        with pytest.raises(ValueError, match="a reward or a fault"):
            Verdict(**arguments)


@NOT_FINITE
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_logprob_that_is_not_finite_is_named_with_whose_it_is_and_where(position, value):
    """Positions count through the whole response, over all segments."""
    whose = {"engine": "the engine's", "trainer": "the trainer's"}
    for source in SOURCES:
        made = scored()
        made.logprobs[source][position] = value
        name = whose.get(source, "the proximal policy's")
        assert made.fault() == f"{name} log-prob of token {position} is {value}"


def test_verdicts_of_a_group_are_in_sample_order_and_all_there():
    group = PromptGroup(4, 0, [trajectory(reward=None, end="stop"), trajectory(reward=1.0)])
    with pytest.raises(ValueError, match="group 4 is not scored"):
        _ = group.verdicts
    # A reward of zero is a reward.
    group.trajectories[0].judge(Verdict(0.0))
    assert [verdict.reward for verdict in group.verdicts] == [0.0, 1.0]
