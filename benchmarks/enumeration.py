"""A policy gradient problem small enough to enumerate, and every estimator's expectation on it.

A softmax policy with a table of logits per prefix writes responses of 3 tokens over a vocabulary of
3. There are 27 of them, each with a reward of its own, so the true gradient of the expected reward
is a sum. As under carry-over, a trajectory begins under version 0, goes on under version 1 and ends
under version 2, the current one, with random cut points. All of these can be enumerated too, so the
*expectation* of every estimator is known exactly, and with it the bias. The estimators are the
package's own; sampling checks the enumeration. ``unbiasedness.py`` prints and draws what follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import torch
from torch import Tensor

from copris_lightning.core.estimator.estimator import Estimate, Estimator
from copris_lightning.core.estimator.losses import ClippedPolicyLoss, ReinforceLoss
from copris_lightning.core.estimator.ratios import (
    SequenceRatio,
    TokenRatio,
    TokenTerms,
    UncorrectedRatio,
)

VOCABULARY = 3
CURRENT = 2
"""The version that is trained; 0 and 1 came before it."""

PLAIN = ReinforceLoss(max_weight=None)
ESTIMATORS: dict[str, Estimator] = {
    "no correction": Estimator(loss=PLAIN, ratio=UncorrectedRatio()),
    "token ratio": Estimator(loss=PLAIN, ratio=TokenRatio()),
    "token ratio, clipped (CoPRIS)": Estimator(loss=ClippedPolicyLoss(), ratio=TokenRatio()),
    "sequence ratio, normalized (GSPO)": Estimator(loss=PLAIN, ratio=SequenceRatio()),
    "sequence ratio": Estimator(loss=PLAIN, ratio=SequenceRatio(length_normalized=False)),
}
"""Only the third clips: the others show what the ratio does by itself."""


@dataclass(frozen=True)
class Problem:
    """A policy, its past and its rewards; all float64.

    Attributes:
        length: tokens of a response.
        theta: logits of the current policy, ``[prefixes, V]``.
        direction: how much the logits changed from version to version, times the shift.
        responses: all of them, ``[V^length, length]``.
        rewards: of each response.
        baseline: a constant, subtracted from the reward to give the advantage.
    """

    length: int
    theta: Tensor
    direction: Tensor
    responses: Tensor
    rewards: Tensor
    baseline: float

    def logits(self, version: int, shift: float) -> Tensor:
        """The table of a version; the current one is theta, whatever the shift."""
        return self.theta - (CURRENT - version) * shift * self.direction


@dataclass(frozen=True)
class Trajectories:
    """All trajectories that can occur: every cut with every response.

    Attributes:
        tokens: ``[n, length]``.
        versions: ``[n, length]``, which version writes each token.
        behavior_logprobs: ``[n, length]``, under that version.
        probabilities: ``[n]``, sum to 1.
        advantages: ``[n]``.
    """

    tokens: Tensor
    versions: Tensor
    behavior_logprobs: Tensor
    probabilities: Tensor
    advantages: Tensor


def make_problem(seed: int = 0, length: int = 3, baseline: float | None = None) -> Problem:
    """A random problem: normal logits and direction, rewards uniform between 0 and 1.

    Args:
        seed: of the problem.
        length: tokens of a response.
        baseline: by default the expected reward, a constant that favours no estimator.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(VOCABULARY**t for t in range(length)), VOCABULARY)
    theta = torch.randn(shape, dtype=torch.float64, generator=generator)
    direction = torch.randn(shape, dtype=torch.float64, generator=generator)
    responses = torch.tensor(list(product(range(VOCABULARY), repeat=length)))
    rewards = torch.rand(len(responses), dtype=torch.float64, generator=generator)
    if baseline is None:
        baseline = float(token_logprobs(theta, responses).sum(dim=1).exp() @ rewards)
    return Problem(length, theta, direction, responses, rewards, baseline)


def prefixes(tokens: Tensor) -> Tensor:
    """The row of the table that each token is drawn from: prefixes counted by length, then as
    numbers in base V. ``[n, length]`` of tokens to ``[n, length]``."""
    rows, number, offset = [], torch.zeros(len(tokens), dtype=torch.long), 0
    for t in range(tokens.shape[1]):
        rows.append(offset + number)
        offset += VOCABULARY**t
        number = number * VOCABULARY + tokens[:, t]
    return torch.stack(rows, dim=1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probs of each token given those before it, ``[n, length]``."""
    return logits.log_softmax(dim=1)[prefixes(tokens), tokens]


def exact_gradient(problem: Problem) -> Tensor:
    r"""The gradient of the expected reward by theta, written out, without autograd:

    .. math:: \sum_o \pi(o)\, R(o) \sum_t (\mathrm{onehot}(o_t) - \pi(\cdot \mid o_{<t}))
    """
    probs, rows = problem.theta.softmax(dim=1), prefixes(problem.responses)
    weights = probs[rows, problem.responses].prod(dim=1) * problem.rewards
    scores = torch.nn.functional.one_hot(problem.responses, VOCABULARY) - probs[rows]
    terms = weights[:, None, None] * scores
    return torch.zeros_like(probs).index_add_(0, rows.flatten(), terms.flatten(0, 1))


def all_cuts(length: int) -> list[tuple[int, int]]:
    """Where version 1 and version 2 take over: equally probable, either may be at an end."""
    return list(combinations_with_replacement(range(length + 1), 2))


def enumerate_trajectories(
    problem: Problem, shift: float, cuts: Sequence[tuple[int, int]] | None = None
) -> Trajectories:
    """Every cut with every response and how probable they are together."""
    cuts = all_cuts(problem.length) if cuts is None else cuts
    count = len(problem.responses)
    tokens = problem.responses.repeat(len(cuts), 1)
    versions = _versions(torch.tensor(cuts), problem.length).repeat_interleave(count, dim=0)
    by_version = torch.stack(
        [token_logprobs(problem.logits(v, shift), tokens) for v in range(CURRENT + 1)]
    )
    behavior = by_version.gather(0, versions[None])[0]
    probabilities = behavior.sum(dim=1).exp() / len(cuts)
    advantages = (problem.rewards - problem.baseline).repeat(len(cuts))
    return Trajectories(tokens, versions, behavior, probabilities, advantages)


def estimate(
    problem: Problem, estimator: Estimator, trajectories: Trajectories
) -> tuple[Tensor, Tensor, Estimate]:
    """What the package makes of each trajectory.

    Returns:
        theta, as a leaf; minus the sum of the token losses of each trajectory, ``[n]``, whose
        gradient by theta is the estimate; and the parts, ``[n, length]``.
    """
    theta = problem.theta.clone().requires_grad_()
    parts = estimator(
        TokenTerms(
            logprobs=token_logprobs(theta, trajectories.tokens),
            behavior_logprobs=trajectories.behavior_logprobs,
            advantages=trajectories.advantages[:, None],
            mask=torch.ones_like(trajectories.tokens, dtype=torch.bool),
            lags=CURRENT - trajectories.versions,
        )
    )
    return theta, -parts.loss.sum(dim=1), parts


def expectation(
    problem: Problem,
    estimator: Estimator,
    shift: float,
    cuts: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """The estimator's expected gradient, exactly, shaped like theta."""
    trajectories = enumerate_trajectories(problem, shift, cuts)
    theta, objectives, _ = estimate(problem, estimator, trajectories)
    return torch.autograd.grad(trajectories.probabilities @ objectives, theta)[0]


def relative_bias(problem: Problem, estimator: Estimator, shift: float) -> float:
    """Norm of expected minus exact gradient, over the norm of the exact one."""
    exact = exact_gradient(problem)
    return float((expectation(problem, estimator, shift) - exact).norm() / exact.norm())


def order(problem: Problem, estimator: Estimator, shift: float = 0.01) -> float:
    """The power of the shift that the bias grows with: its slope on logarithmic axes."""
    biases = [relative_bias(problem, estimator, s) for s in (shift / 2, shift)]
    return math.log2(biases[1] / biases[0])


def gradient_of_each(problem: Problem, estimator: Estimator, trajectories: Trajectories) -> Tensor:
    """The estimate that each single trajectory gives, ``[n, parameters]``."""
    theta, objectives, _ = estimate(problem, estimator, trajectories)
    each = torch.eye(len(objectives), dtype=objectives.dtype)
    (gradients,) = torch.autograd.grad(objectives, theta, each, is_grads_batched=True)
    return gradients.flatten(1)


def sample(problem: Problem, shift: float, samples: int, generator: torch.Generator) -> Tensor:
    """Trajectories as a rollout makes them, token by token, each under the version whose turn it
    is. Their numbers in :func:`enumerate_trajectories`, ``[samples]``."""
    cuts = torch.tensor(all_cuts(problem.length))
    cut = torch.randint(len(cuts), (samples,), generator=generator)
    versions = _versions(cuts, problem.length)[cut]
    probs = torch.stack([problem.logits(v, shift).softmax(dim=1) for v in range(CURRENT + 1)])
    response, offset = torch.zeros(samples, dtype=torch.long), 0
    for t in range(problem.length):
        at = probs[versions[:, t], offset + response]
        token = torch.multinomial(at, 1, generator=generator)[:, 0]
        response, offset = response * VOCABULARY + token, offset + VOCABULARY**t
    return cut * len(problem.responses) + response


@dataclass(frozen=True)
class MonteCarlo:
    """A sampled estimate, ``[parameters]`` each.

    Attributes:
        mean: of the trajectories' gradients.
        error: its standard error.
    """

    mean: Tensor
    error: Tensor

    def distance(self, exact: Tensor) -> float:
        """How far the mean is from the exact gradient, in standard errors: the root mean square
        over the coordinates, weighted by their variances. About 1 if nothing but chance is wrong.
        """
        return float((self.mean - exact.flatten()).norm() / self.error.norm())


def monte_carlo(gradients: Tensor, drawn: Tensor) -> MonteCarlo:
    """The mean over drawn trajectories and its standard error.

    Args:
        gradients: of every trajectory, from :func:`gradient_of_each`.
        drawn: numbers of trajectories, from :func:`sample`.
    """
    shares = drawn.bincount(minlength=len(gradients)).to(gradients.dtype) / len(drawn)
    mean = shares @ gradients
    variance = shares @ (gradients - mean).square()
    return MonteCarlo(mean, (variance / (len(drawn) - 1)).sqrt())


def noise(gradients: Tensor, trajectories: Trajectories) -> float:
    """Standard deviation of one trajectory's gradient, as a norm, exactly."""
    deviations = gradients - trajectories.probabilities @ gradients
    return float((trajectories.probabilities @ deviations.square()).sum().sqrt())


def _versions(cuts: Tensor, length: int) -> Tensor:
    positions = torch.arange(length)
    return (positions >= cuts[:, :1]).long() + (positions >= cuts[:, 1:]).long()
