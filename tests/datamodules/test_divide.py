"""A batch is divided completely, and how it is divided does not show in the gradient."""

import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trajectories import trajectory

from copris_lightning import BatchSize, Sampling
from copris_lightning.core.estimator.estimator import Estimator
from copris_lightning.core.estimator.normalization import NORMALIZATIONS
from copris_lightning.core.estimator.ratios import TokenTerms
from copris_lightning.core.outcome import TRUNCATED, Credit
from copris_lightning.core.partition import forward_cost
from copris_lightning.core.trajectory import PromptGroup, Trajectory
from copris_lightning.datamodules.divide import BatchShape, divide, sequence_length
from copris_lightning.errors import ConfigurationError

VOCAB, WIDTH = 40, 4
OPTIONS = {
    "source": "engine",
    "policy_version": 6,
    "sampling": Sampling(0.8, 99),
    "metrics": {"a/b": 1.5},
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """On a busy machine, threads that wait for each other cost more than these tiny sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_groups(count, size, seed):
    """Groups whose trajectories are told apart by their first prompt token; skewed lengths."""
    rng = random.Random(seed)
    groups = []
    for g in range(count):
        rows = []
        for i in range(size):
            t = Trajectory(g, i, f"p{g}", (g * size + i, *[1] * rng.randrange(3)), 99)
            for version in range(rng.randrange(3)):
                n = rng.choice([1, 2, 3, 9])
                tokens = [rng.randrange(6) for _ in range(n)]
                t.append(tokens, [-rng.random() * 5 for _ in tokens], version)
            t.credit = Credit(rng.choice([-1.0, 0.0, 0.5, 1.0]))
            rows.append(t)
        # An update without any token to train on would have no mean.
        rows[0].append([2, 0], [-3.0, -1.5], 4)
        groups.append(PromptGroup(g, g, rows, 0))
    return groups


@st.composite
def problems(draw):
    count, size = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    shape = BatchShape(
        world_size=draw(st.integers(1, 4)),
        updates=draw(st.integers(1, count)),
        micro_batches=draw(st.integers(1, 4)),
        hidden_size=16,
        packed=draw(st.booleans()),
    )
    smallest = count // shape.updates * size
    assume(smallest >= shape.world_size * shape.micro_batches)
    groups = make_groups(count, size, draw(st.integers(0, 10**6)))
    return groups, shape, draw(st.integers(0, 99))


def updates_of(ranks, shape):
    """The micro-batches of each optimizer step, over all ranks, dearest first."""
    for u in range(shape.updates):
        steps = range(u * shape.micro_batches, (u + 1) * shape.micro_batches)
        yield [ranks[r][s] for s in steps for r in range(shape.world_size)]


def rows_of(groups, micro_batches):
    """The trajectories of micro-batches, found by their first token."""
    rows = {t.prompt[0]: t for g in groups for t in g.trajectories}
    return [rows[int(row[0])] for b in micro_batches for row in b.input_ids]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_each_trajectory_goes_to_one_place_and_each_rank_gets_as_many_micro_batches(problem):
    groups, shape, seed = problem
    ranks = divide(groups, shape, **OPTIONS, seed=seed)
    assert [len(r) for r in ranks] == [shape.updates * shape.micro_batches] * shape.world_size
    found = rows_of(groups, [b for rank in ranks for b in rank])
    keys = sorted((t.group_id, t.sample) for t in found)
    assert keys == [(g.group_id, t.sample) for g in groups for t in g.trajectories]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_each_update_has_whole_groups_and_the_token_count_of_all_its_ranks(problem):
    groups, shape, seed = problem
    ranks = divide(groups, shape, **OPTIONS, seed=seed)
    seen = set()
    for micro_batches in updates_of(ranks, shape):
        rows = rows_of(groups, micro_batches)
        ids = {t.group_id for t in rows}
        assert not ids & seen
        assert len(rows) == len(ids) * len(groups[0].trajectories)
        seen |= ids
        tokens = sum(t.response_length for t in rows)
        assert {b.totals for b in micro_batches} == {(len(rows), tokens, 99)}
        assert sum(int(b.response_mask.sum()) for b in micro_batches) == tokens
    shares = [len(rows_of(groups, m)) for m in updates_of(ranks, shape)]
    assert max(shares) - min(shares) <= len(groups[0].trajectories)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_micro_batches_of_like_cost_run_side_by_side(problem):
    groups, shape, seed = problem
    cost = forward_cost(shape.hidden_size)
    for micro_batches in updates_of(divide(groups, shape, **OPTIONS, seed=seed), shape):
        longest = [int(b.lengths.max()) for b in micro_batches]
        if not shape.packed:
            assert longest == sorted(longest, reverse=True)
            continue
        costs = [sum(cost(n) for n in b.lengths.tolist()) for b in micro_batches]
        assert costs == sorted(costs, reverse=True)
        assert costs[0] - costs[-1] <= cost(max(longest))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_only_the_last_micro_batch_of_a_rank_is_last_and_bears_the_metrics(problem):
    groups, shape, seed = problem
    for rank in divide(groups, shape, **OPTIONS, seed=seed):
        assert [b.is_last for b in rank] == [False] * (len(rank) - 1) + [True]
        assert [b.metrics for b in rank] == [{}] * (len(rank) - 1) + [{"a/b": 1.5}]
        assert {(b.policy_version, b.sampling.temperature) for b in rank} == {(6, 0.8)}


def same(left, right):
    names = ("input_ids", "behavior_logprobs", "advantages", "versions")
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one, other, strict=True)
        for name in names
    )


def test_dividing_again_gives_the_same_and_another_seed_another_deal():
    groups = make_groups(6, 2, seed=0)
    shape = BatchShape(world_size=2, updates=3, micro_batches=2, hidden_size=16)
    first = divide(groups, shape, **OPTIONS, seed=1)
    before = [g.group_id for g in groups]
    random.seed(5), torch.manual_seed(5)
    assert same(first, divide(groups, shape, **OPTIONS, seed=1))
    assert [g.group_id for g in groups] == before
    deals = set()
    for seed in range(6):
        ranks = divide(groups, shape, **OPTIONS, seed=seed)
        updates = [rows_of(groups, m) for m in updates_of(ranks, shape)]
        deals.add(tuple(frozenset(t.group_id for t in rows) for rows in updates))
    assert len(deals) > 2


def test_the_behaviour_is_taken_from_the_source_asked_for():
    groups = make_groups(1, 2, seed=3)
    for t in groups[0].trajectories:
        t.add_logprobs("trainer", [-0.25] * t.response_length)
    shape = BatchShape(world_size=1, updates=1, micro_batches=1, hidden_size=16)
    ((batch,),) = divide(groups, shape, **{**OPTIONS, "source": "trainer"}, seed=0)
    assert (batch.behavior_logprobs[batch.response_mask] == -0.25).all()


def test_excluded_trajectories_are_left_out_unless_a_micro_batch_would_be_empty():
    groups = make_groups(2, 4, seed=1)
    rows = [t for g in groups for t in g.trajectories]
    for t in rows[:5]:
        t.credit = Credit(t.credit.advantage, TRUNCATED)
    kept = sum(t.response_length for t in rows[5:])
    for micro_batches, count in ((1, 3), (3, 3), (4, 4), (8, 8)):
        shape = BatchShape(1, 1, micro_batches, hidden_size=16)
        (rank,) = divide(groups, shape, **OPTIONS, seed=0)
        assert len(rank) == micro_batches
        assert sum(len(b.included) for b in rank) == count
        assert sum(int(b.included.sum()) for b in rank) == 3
        assert {b.totals for b in rank} == {(3, kept, 99)}
        assert sum(int(b.loss_mask.sum()) for b in rank) == kept


@pytest.mark.parametrize(
    ("world_size", "updates", "micro_batches", "fits"),
    [(1, 1, 8, True), (2, 2, 2, True), (1, 1, 9, False), (3, 3, 1, False), (2, 2, 3, False)],
)
def test_a_shape_with_an_empty_micro_batch_is_refused_with_the_keys(
    world_size, updates, micro_batches, fits
):
    shape = BatchShape(world_size, updates, micro_batches, hidden_size=16)
    if fits:
        shape.check(BatchSize(4, 2))
        return
    with pytest.raises(ConfigurationError) as caught:
        shape.check(BatchSize(4, 2))
    for part in (
        f"update of {4 // updates * 2} trajectories",
        f"{world_size} ranks",
        f"batch.updates={updates}",
        f"trainer.accumulate_grad_batches={micro_batches}",
        "batch.groups",
    ):
        assert part in str(caught.value)


def test_each_shape_that_passes_the_check_can_be_divided():
    """Also where the groups do not go evenly into the updates."""
    for count in (1, 2, 3, 5):
        groups = make_groups(count, 2, seed=count)
        for updates in range(1, count + 1):
            for micro_batches in range(1, 2 * count + 1):
                shape = BatchShape(1, updates, micro_batches, hidden_size=16)
                try:
                    shape.check(BatchSize(count, 2))
                except ConfigurationError:
                    continue
                divide(groups, shape, **OPTIONS, seed=0)


def policy():
    """A causal model whose output at a position depends on all before it, and on no padding."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((VOCAB, WIDTH), (WIDTH, VOCAB))
    ]


def logits(parameters, input_ids):
    embedding, head = parameters
    return torch.tanh(embedding[input_ids].cumsum(-2) / 3) @ head


def token_losses(now, behavior, advantages, mask, lags):
    return Estimator()(TokenTerms(now, behavior, advantages, mask, lags)).loss


def micro_batch_loss(parameters, batch, normalization="token_mean"):
    positions = batch.response_positions
    # A lone prompt token without a response has nothing before it; its place is padding.
    before = (positions - 1).clamp(min=0)
    predictors = logits(parameters, batch.input_ids).log_softmax(-1)
    at = predictors.gather(1, before[:, :, None].expand(-1, -1, VOCAB))
    now = at.gather(2, batch.input_ids.gather(1, positions)[:, :, None]).squeeze(2)
    advantages = batch.advantages[:, None]
    loss = token_losses(now, batch.behavior_logprobs, advantages, batch.loss_mask, batch.lags)
    weights = NORMALIZATIONS[normalization](batch.response_lengths, batch.totals)
    return (loss.sum(1) * weights).sum()


def whole_loss(parameters, rows):
    """The token mean over all rows, one at a time and without any padding."""
    total = 0.0
    for t in rows:
        sequence = torch.tensor(t.sequence.tolist())
        start = len(t.prompt)
        predictors = logits(parameters, sequence[None])[0].log_softmax(-1)
        now = predictors[start - 1 : -1].gather(1, sequence[start:, None])[:, 0]
        behavior = torch.tensor(t.column("engine").tolist())
        mask = torch.ones(1, len(now), dtype=torch.bool)
        losses = token_losses(
            now[None], behavior[None], torch.tensor([[t.credit.advantage]]), mask, mask.long()
        )
        total = total + losses.sum()
    return total / sum(t.response_length for t in rows)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_gradients_do_not_depend_on_micro_batches_or_ranks(problem):
    groups, shape, seed = problem
    parameters = policy()
    ranks = divide(groups, shape, **OPTIONS, seed=seed)
    for micro_batches in updates_of(ranks, shape):
        expected = torch.autograd.grad(
            whole_loss(parameters, rows_of(groups, micro_batches)), parameters, allow_unused=True
        )
        summed = [torch.zeros_like(p) for p in parameters]
        for batch in micro_batches:
            gradients = torch.autograd.grad(micro_batch_loss(parameters, batch), parameters)
            summed = [s + g for s, g in zip(summed, gradients, strict=True)]
        for ours, theirs in zip(summed, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_the_length_of_a_trajectory_is_its_prompt_and_response():
    t = trajectory((0, [3, 4, 5], [-1.0] * 3), prompt=(1, 2))
    assert sequence_length(t) == 5
