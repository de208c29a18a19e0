"""The buffer against a naive model: every rule on both, every invariant after every step."""

import copy
import io

import pytest
import torch
from buffer_model import STOP, Model
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trajectories import plain, versions

from copris_lightning.core.buffer import CarryOverBuffer, Status


def assert_plain(value):
    """Exact types only: a subclass (an enum, a Counter) would not load with the safe default."""
    if type(value) is dict:
        for key, item in value.items():
            assert type(key) is str
            assert_plain(item)
    elif type(value) in (list, tuple):
        for item in value:
            assert_plain(item)
    elif type(value) is not torch.Tensor:
        assert type(value) in (int, float, str, bool, type(None)), type(value)


class BufferMachine(RuleBasedStateMachine):
    """Drives the model, a buffer, and a twin that is saved and loaded now and then."""

    @initialize(
        limit=st.integers(1, 4),
        group_size=st.sampled_from([1, 1, 2, 3]),
        batch_groups=st.integers(1, 2),
        max_tokens=st.integers(1, 5),
        bound=st.sampled_from([None, 0, 1, 1, 2]),
    )
    def create(self, limit, group_size, batch_groups, max_tokens, bound):
        self.model = Model(limit, group_size, batch_groups, max_tokens, bound)
        self.buffer, self.twin = self.empty(), self.empty()

    def empty(self):
        buffer = CarryOverBuffer(
            limit=1,
            group_size=self.model.group_size,
            batch_groups=self.model.batch_groups,
            max_new_tokens=self.model.max_tokens,
            stop_token_ids=[STOP],
            max_staleness=self.model.bound,
        )
        buffer.limit = self.model.limit
        return buffer

    def both(self, call):
        """The call's result, which must be the same from the buffer and its reloaded twin."""
        result, twin = call(self.buffer), call(self.twin)
        assert result == twin
        return result

    def refused(self, error, call):
        for buffer in (self.buffer, self.twin):
            with pytest.raises(error):
                call(buffer)

    def any_of(self, data, *states):
        return data.draw(st.sampled_from(self.model.keys(*states)))

    @precondition(lambda self: len(self.model.groups) < 8)
    @rule()
    def admit(self):
        def call(b):
            return b.admit(f"p{self.model.admitted}", self.model.admitted + 7, [5, 6])

        if not self.model.may_admit():
            self.refused(AssertionError, call)
            return
        assert self.both(call) == self.model.admitted
        self.model.admit()

    @rule(count=st.integers(1, 5))
    def next(self, count):
        for _ in range(count):
            started = self.both(lambda b: b.next())
            key = started and (started.group_id, started.sample)
            assert key == self.model.next()

    @rule(limit=st.integers(0, 4))
    def set_limit(self, limit):
        self.model.limit = self.buffer.limit = self.twin.limit = limit

    @precondition(lambda self: self.model.rows("in_flight"))
    @rule(data=st.data(), size=st.integers(0, 3), stop=st.booleans())
    def append(self, data, size, stop):
        key = self.any_of(data, "in_flight")
        version = data.draw(st.integers(self.oldest_possible(key), self.model.version))
        size = min(size, self.model.max_tokens - len(self.model.row(key)["tokens"]))
        tokens = data.draw(st.lists(st.integers(1, 9), min_size=size, max_size=size))
        logprobs = data.draw(st.lists(st.floats(-9, 0, width=32), min_size=size, max_size=size))
        if stop and tokens:
            tokens[-1] = STOP
        self.both(lambda b: b.append(key, tokens, logprobs, version))
        self.model.append(key, tokens, logprobs, version)

    def oldest_possible(self, key):
        """The version of a chunk that was made, perhaps, before the last swaps."""
        row = self.model.row(key)
        return row["tokens"][-1][2] if row["tokens"] else self.model.group_of(row)["first"]

    @precondition(lambda self: self.model.rows("in_flight"))
    @rule(data=st.data())
    def append_what_does_not_fit(self, data):
        key, version = self.any_of(data, "in_flight"), self.model.version
        over = [3] * (self.model.max_tokens - len(self.model.row(key)["tokens"]) + 1)
        old = self.oldest_possible(key) - 1
        self.refused(ValueError, lambda b: b.append(key, [3], [], version))
        self.refused(ValueError, lambda b: b.append(key, over, [-1.0] * len(over), version))
        self.refused(ValueError, lambda b: b.append(key, [STOP, 3], [-1.0] * 2, version))
        self.refused(ValueError, lambda b: b.append(key, [3], [-1.0], version + 1))
        self.refused(ValueError, lambda b: b.append(key, [3], [-1.0], old))

    @precondition(lambda self: self.model.rows("in_flight"))
    @rule(data=st.data(), reason=st.sampled_from(["stop", "length"]))
    def finish(self, data, reason):
        key = self.any_of(data, "in_flight")
        self.both(lambda b: b.finish(key, reason))
        self.model.finish(key, reason)

    @precondition(lambda self: self.model.rows("in_flight"))
    @rule(data=st.data())
    def yield_place(self, data):
        key = self.any_of(data, "in_flight")
        self.both(lambda b: b.yield_place(key))
        self.model.yield_place(key)

    @rule()
    def carry_over(self):
        assert self.both(lambda b: b.carry_over()) == self.model.carry_over()

    @precondition(lambda self: self.model.rows("finished"))
    @rule(data=st.data(), reward=st.floats(-1, 1))
    def score(self, data, reward):
        key = self.any_of(data, "finished")
        assert self.both(lambda b: b.score(key, reward)) == self.model.score(key, reward)

    @rule(count=st.integers(1, 6), youngest=st.booleans())
    def complete_some(self, count, youngest):
        for key in sorted(self.model.keys("in_flight"), reverse=youngest)[:count]:
            self.both(lambda b, key=key: b.append(key, [STOP], [-0.5], self.model.version))
            self.model.append(key, [STOP], [-0.5], self.model.version)
        for key in self.model.keys("finished"):
            assert self.both(lambda b, key=key: b.score(key, 1.0)) == self.model.score(key, 1.0)

    @rule(
        count=st.integers(1, 4),
        youngest=st.booleans(),
        streaming=st.booleans(),
        reload=st.booleans(),
    )
    def run_a_batch(self, count, youngest, streaming, reload):
        """What a scheduler does, so that runs of some twenty steps get through many versions."""
        self.settle()
        self.set_limit(limit=4)
        self.fill()
        self.complete_some(count=count, youngest=youngest)
        if reload:
            self.save_and_load()
        if self.model.can_take():
            if not streaming:
                self.carry_over()
            self.take()
            if streaming:
                self.fill()
            self.advance()

    def fill(self):
        while self.model.may_admit() and len(self.model.groups) < 5:
            self.admit()
        self.next(count=4)

    @precondition(lambda self: self.model.rows("ready"))
    @rule(data=st.data())
    def evict(self, data):
        group = self.model.group_of(self.model.row(self.any_of(data, "ready")))
        self.check_group(self.both(lambda b: b.evict(group["id"])), group)
        self.model.remove(group, self.model.evicted)

    @rule()
    def settle(self):
        self.both(lambda b: b.settle())
        self.model.settle()

    @rule()
    def take(self):
        ready = self.model.by_urgency(ready=True)[: self.model.batch_groups]
        if len(ready) < self.model.batch_groups:
            self.refused(ValueError, lambda b: b.take())
        elif self.model.can_take():
            self.model.settle()
            taken = self.both(lambda b: b.take())
            for actual, group in zip(taken, ready, strict=True):
                self.check_group(actual, group)
                assert all(t.reward is not None and t.finish_reason for t in actual.trajectories)
                if self.model.bound is not None:
                    made = [v for t in actual.trajectories for v in versions(t)]
                    assert all(self.model.version - v <= self.model.bound for v in made)
                self.model.remove(group, self.model.taken)

    @rule()
    def advance(self):
        version = self.model.version
        self.both(lambda b: b.advance(version))
        if version:
            self.refused(ValueError, lambda b: b.advance(version - 1))
        # The bound counts on a batch per version; whatever was started since it was taken.
        if self.model.taken or self.model.bound is None:
            self.both(lambda b: b.advance(version + 1))
            self.model.version += 1
            self.model.settle()

    @rule()
    def save_and_load(self):
        state = self.twin.state_dict()
        assert_plain(state)
        before, file = copy.deepcopy(state), io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.twin = self.empty()
        self.twin.load_state_dict(torch.load(file, weights_only=True))
        assert plain(self.twin.state_dict()) == plain(before)
        # What is in flight is saved as carried over, so the buffer that goes on does the same.
        assert self.buffer.carry_over() == self.model.carry_over()

    def check_group(self, actual, group):
        assert (actual.group_id, actual.prompt_index) == (group["id"], group["id"] + 7)
        assert actual.first_version == group["first"]
        for trajectory, row in zip(actual.trajectories, group["rows"], strict=True):
            self.check_trajectory(trajectory, row)

    def check_trajectory(self, actual, row):
        assert (actual.group_id, actual.sample) == row["key"]
        assert actual.prompt_id == f"p{row['key'][0]}"
        assert actual.prompt == (5, 6)
        assert (actual.finish_reason, actual.reward) == (row["end"], row["reward"])
        labels = versions(actual)
        fields = (actual.tokens, actual.column("engine"), labels)
        assert list(zip(*fields, strict=True)) == row["tokens"]
        assert labels == sorted(labels)
        assert actual.response_length <= self.model.max_tokens

    @invariant()
    def equals_the_model(self):
        for buffer in (self.buffer, self.twin):
            for status in Status:
                assert buffer.keys(status) == self.model.keys(str(status))
                if status not in (Status.DELIVERED, Status.EVICTED):
                    assert buffer.count(status) == len(buffer.keys(status))
            assert buffer.version == self.model.version
            assert buffer.may_admit() == self.model.may_admit()
            assert buffer.can_take() == self.model.can_take()
            assert buffer.ready_groups * self.model.group_size == len(self.model.rows("ready"))
            for group in self.model.groups:
                self.check_group(buffer.group(group["id"]), group)
        assert plain(self.buffer.state_dict()) == plain(self.twin.state_dict())

    @invariant()
    def keeps_count(self):
        size = self.model.group_size
        for buffer in (self.buffer, self.twin):
            assert buffer.admitted == self.model.admitted * size
            assert buffer.admitted == sum(buffer.count(status) for status in Status)
            assert buffer.count(Status.DELIVERED) == len(self.model.delivered) * size
            assert buffer.count(Status.EVICTED) == len(self.model.evicted) * size
            assert buffer.in_flight == buffer.count(Status.IN_FLIGHT)
            assert buffer.count(Status.TAKEN) == len(self.model.taken) * size
        gone = self.model.taken + self.model.delivered + self.model.evicted
        here = [g["id"] for g in self.model.groups]
        assert sorted(gone + here) == list(range(self.model.admitted))

    @invariant()
    def never_gets_stuck(self):
        urgent = self.model.by_urgency(ready=False)[: self.model.batch_groups]
        if len(urgent) == self.model.batch_groups and all(
            row["state"] == "ready" for group in urgent for row in group["rows"]
        ):
            assert self.buffer.can_take()


BufferMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestBufferAgainstModel = BufferMachine.TestCase
