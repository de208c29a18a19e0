"""The quickstart's task: written column addition, checked by its final result.

The prompt ``47+85=`` is answered ``7+5+0=12;4+8+1=13;#132.``: one step for each column from the
right (digit + digit + carry = two-digit sum), then ``#``, the result and a full stop. Both operands
have the same number of digits, drawn from a truncated geometric distribution, so that most
responses are short and a few are ten times as long: the long tail that partial rollouts are for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import accumulate

from copris_lightning.rollout.rewards import Prompt

MAX_DIGITS = 12
"""Digits of the longest operands, unless told otherwise."""

_STEP = "7+5+0=12;"
_RESULT = re.compile(r"[^#]*#(\d+)\.")
_SUM = re.compile(r"(\d+)\+(\d+)=")


class AdditionPrompts:
    """Addition problems, of which item ``i`` depends on ``(seed, i)`` and nothing else.

    Args:
        size: number of prompts.
        seed: two seeds give two unrelated sequences; short sums occur in both.
        min_digits: fewest digits of an operand.
        max_digits: most digits of an operand; bounds the response, see :func:`max_response_length`.
        tail: how much rarer each further digit is, ``P(n) ~ tail**n``. 1 makes all lengths equally
            likely; small values leave hardly any long sums.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        size: int = 4096,
        seed: int = 0,
        min_digits: int = 1,
        max_digits: int = MAX_DIGITS,
        tail: float = 0.8,
    ) -> None:
        if size < 1:
            raise ValueError(f"size is {size}, but there must be a prompt: set size to 1 or more")
        if min_digits < 1:
            raise ValueError(f"min_digits is {min_digits}: set min_digits to 1 or more")
        if max_digits < min_digits:
            raise ValueError(
                f"max_digits is {max_digits}, below min_digits ({min_digits}): raise max_digits"
            )
        if not 0.0 < tail <= 1.0:
            raise ValueError(f"tail is {tail}, not in (0, 1]: set tail to, say, 0.8")
        self.size = size
        self.seed = seed
        self._digits = range(min_digits, max_digits + 1)
        self._cumulative = list(accumulate(tail ** (n - min_digits) for n in self._digits))

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Prompt]:
        return map(self.__getitem__, range(self.size))

    def __getitem__(self, index: int) -> Prompt:
        if not -self.size <= index < self.size:
            raise IndexError(f"prompt {index} of {self.size}")
        index %= self.size
        # A string seed is hashed whole, so neighbouring seeds and items share nothing.
        rng = random.Random(f"addition/{self.seed}/{index}")
        (digits,) = rng.choices(self._digits, cum_weights=self._cumulative)
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        return Prompt(id=f"add-{index:06d}", text=f"{a}+{b}=", answer=str(a + b))


class AdditionReward:
    """1.0 for the right final result, else 0.0; how it was reached is not looked at.

    The result is what stands between the response's only ``#`` and the full stop that ends it. A
    response that was cut short, goes on after the full stop or states two results earns nothing.
    """

    def __call__(self, response: str, prompt: Prompt) -> float:
        match = _RESULT.fullmatch(response)
        return float(match is not None and match[1] == str(prompt.answer))


def max_response_length(digits: int) -> int:
    """Characters of the longest demonstration for operands of ``digits`` digits."""
    return digits * len(_STEP) + len("#") + digits + 1 + len(".")


def demonstration(prompt: Prompt, rng: random.Random, error_rate: float) -> str:
    """A pupil's written answer to ``prompt``, in which each step goes wrong on its own account.

    A wrong step has a sum off by one, or the wrong carry. The pupil does not notice: the wrong
    carry enters the next column and the wrong digit the result: longer sums are wrong more often.

    Args:
        prompt: one of :class:`AdditionPrompts`, ``text`` of the form ``a+b=``.
        rng: where the mistakes come from.
        error_rate: probability that a step is wrong; at 0 the result is always right.

    Raises:
        ValueError: ``error_rate`` is no probability, or the prompt is not such a sum.
    """
    if not 0.0 <= error_rate <= 1.0:
        raise ValueError(f"error_rate is {error_rate}, not in [0, 1]: set error_rate to, say, 0.15")
    operands = _SUM.fullmatch(prompt.text or "")
    if operands is None or len(operands[1]) != len(operands[2]):
        raise ValueError(
            f"prompt {prompt.id} is {prompt.text!r}, not a sum of two numbers of equal length: "
            "take prompts from AdditionPrompts"
        )
    steps, result, carry = [], "", 0
    for a, b in zip(reversed(operands[1]), reversed(operands[2]), strict=True):
        total = int(a) + int(b) + carry
        if rng.random() < error_rate:
            total = _slip(total, rng)
        steps.append(f"{a}+{b}+{carry}={total:02d};")
        carry, digit = divmod(total, 10)
        result = f"{digit}{result}"
    return "".join(steps) + f"#{carry or ''}{result}."


def _slip(total: int, rng: random.Random) -> int:
    """A sum near ``total`` (0 to 19) that is not ``total``: off by one, or by the carry."""
    return rng.choice([t for t in (total - 1, total + 1, total + 10, total - 10) if 0 <= t <= 19])
