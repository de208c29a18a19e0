"""The quickstart's task: division by repeated subtraction, checked by its remainder.

The prompt ``75%9=`` is answered ``84;93;03;12;21;3;#3.``: what is left of 57 after each subtraction
of 9, then ``#``, the remainder and a full stop. Numbers are written from the ones on, as they are
computed. The quotient, which is the number of steps, is drawn from a
power law: most responses are short and a few are ten times as long, the long tail that partial
rollouts are for. How long a response will be is not to be seen from its prompt's length.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import accumulate

from copris_lightning.rollout.rewards import Prompt

MAX_QUOTIENT = 100
"""Subtractions of the longest response, unless told otherwise."""

_DIVISORS = range(2, 10)
_RESULT = re.compile(r"[^#]*#(\d+)\.")
_DIVISION = re.compile(r"(\d+)%([2-9])=")


class DivisionPrompts:
    """Divisions by one digit, of which item ``i`` depends on ``(seed, i)`` and nothing else.

    Args:
        size: number of prompts.
        seed: two seeds give two unrelated sequences; short divisions occur in both.
        max_quotient: most subtractions; bounds the response, see :func:`max_response_length`.
        tail: how much rarer large quotients are, ``P(q) ~ q**-tail``. 0 makes all lengths equally
            likely; large values leave hardly any long responses.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        size: int = 4096,
        seed: int = 0,
        max_quotient: int = MAX_QUOTIENT,
        tail: float = 1.3,
    ) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, but there must be a prompt: set size to 1 or more")
        if max_quotient < 1:
            raise ValueError(f"max_quotient is {max_quotient}: set max_quotient to 1 or more")
        if not 0.0 <= tail < float("inf"):
            raise ValueError(f"tail is {tail}, not a number from 0 on: set tail to, say, 1.3")
        self.size = size
        self.seed = seed
        self._quotients = range(1, max_quotient + 1)
        self._cumulative = list(accumulate(q**-tail for q in self._quotients))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.__getitem__, range(self.size))

    def __getitem__(self, index: int) -> Prompt:
        if not -self.size <= index < self.size:
            raise IndexError(f"prompt {index} of {self.size}")
        index %= self.size
        # A string seed is hashed whole, so neighbouring seeds and items share nothing.
        rng = random.Random(f"division/{self.seed}/{index}")
        (quotient,) = rng.choices(self._quotients, cum_weights=self._cumulative)
        divisor = rng.choice(_DIVISORS)
        remainder = rng.randrange(divisor)
        text = f"{_written(quotient * divisor + remainder)}%{divisor}="
        return Prompt(id=f"div-{index:06d}", text=text, answer=str(remainder))


class DivisionReward:
    """1.0 for the right remainder, else 0.0; how it was reached is not looked at.

    The remainder is what stands between the response's only ``#`` and the full stop that ends it. A
    response that was cut short, goes on after the full stop or states two results earns nothing.
    """

    def __call__(self, response: str, prompt: Prompt) -> float:
        match = _RESULT.fullmatch(response)
        return float(match is not None and match[1] == str(prompt.answer))


def max_response_length(max_quotient: int) -> int:
    """Characters of the longest demonstration with ``max_quotient`` subtractions."""
    left = [q * max(_DIVISORS) + max(_DIVISORS) - 1 for q in range(max_quotient)]
    return sum(len(f"{number};") for number in left) + len("#8.")


def demonstration(prompt: Prompt, rng: random.Random, error_rate: float) -> str:
    """A pupil's written answer to ``prompt``, in which each step goes wrong on its own account.

    A wrong step is off by one, and the pupil goes on from there without noticing: longer divisions
    are wrong more often.

    Args:
        prompt: one of :class:`DivisionPrompts`, ``text`` of the form ``n%d=``.
        rng: where the mistakes come from.
        error_rate: probability that a step is wrong; at 0 the result is always right.

    Raises:
        ValueError: ``error_rate`` is no probability, or the prompt is not such a division.
    """
    if not 0.0 <= error_rate < 1.0:
        raise ValueError(f"error_rate is {error_rate}, not in [0, 1): set error_rate to, say, 0.05")
    operands = _DIVISION.fullmatch(prompt.text or "")
    if operands is None:
        raise ValueError(
            f"prompt {prompt.id} is {prompt.text!r}, not a division by one digit: "
            "take prompts from DivisionPrompts"
        )
    left, divisor = int(operands[1][::-1]), int(operands[2])
    steps = []
    while left >= divisor:
        left -= divisor
        if rng.random() < error_rate:
            left = max(0, left + rng.choice((-1, 1)))
        steps.append(f"{_written(left)};")
    return "".join(steps) + f"#{left}."


def _written(number: int) -> str:
    """``number`` from the ones on."""
    return str(number)[::-1]
