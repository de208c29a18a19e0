"""An engine's time, from one end of a response to the next."""

from __future__ import annotations

import math
from bisect import bisect_right
from heapq import heappop, heappush

from copris_lightning.core.buffer import Key
from copris_lightning.core.timing.costs import Costs, Work


class Decoding:
    """Trajectories that are in flight together. Each makes one token a step, so that between two
    ends all steps are counted at once, however many they are.

    Args:
        costs: of steps and prefixes.

    Attributes:
        now: seconds since the beginning.
    """

    def __init__(self, costs: Costs) -> None:
        self.now = 0.0
        self._costs = costs
        self._step = self._slots = self._kv = self._prefix = 0
        self._held = 0
        self._ends: list[tuple[int, Key]] = []
        self._begun: dict[Key, int] = {}
        """The step at which each would have had no token yet, had it never been interrupted."""

    @property
    def in_flight(self) -> int:
        """Trajectories in flight."""
        return len(self._ends)

    @property
    def work(self) -> Work:
        """What was done until now."""
        return Work(steps=self._step, slots=self._slots, kv=self._kv, prefix=self._prefix)

    def start(self, key: Key, prompt: int, made: int, length: int) -> None:
        """Put a trajectory in flight; its prefix is computed first, and all others wait for it.

        Args:
            key: its name.
            prompt: tokens of its prompt.
            made: tokens of its response so far.
            length: tokens of its response in the end, more than ``made``.
        """
        prefix = prompt + made
        self.now += prefix * self._costs.prefix_s
        self._prefix += prefix
        self._held += prefix
        self._begun[key] = self._step - made
        heappush(self._ends, (self._step + length - made, key))

    def run(self, until: float = math.inf) -> list[Key]:
        """Decode until some response ends, but not past a time.

        A step that would end after that time is not begun, and the rest of the time is lost.

        Returns:
            which have ended; none if the time came first.
        """
        ahead = self._ends[0][0] - self._step if self._ends else 0
        within = self._steps_within(until - self.now, ahead)
        self._decode(within)
        if not self._ends or within < ahead:
            self.now = max(self.now, until)
            return []
        ended = []
        while self._ends and self._ends[0][0] == self._step:
            ended.append(heappop(self._ends)[1])
        return ended

    def leave(self, key: Key, prompt: int) -> int:
        """Let go of what is in memory of a trajectory that has ended. Returns its length."""
        made = self._step - self._begun.pop(key)
        self._held -= prompt + made
        return made

    def end_streams(self) -> dict[Key, int]:
        """Nothing is in flight any more. Returns how many tokens of each were made."""
        made = {key: self._step - begun for key, begun in self._begun.items()}
        self._ends, self._begun, self._held = [], {}, 0
        return made

    def _decode(self, steps: int) -> None:
        flying = len(self._ends)
        self.now += self._seconds(steps)
        self._kv += self._read(steps)
        self._slots += steps * flying
        self._step += steps
        self._held += steps * flying

    def _steps_within(self, seconds: float, most: int) -> int:
        if seconds == math.inf:
            return most
        return bisect_right(range(1, most + 1), seconds, key=self._seconds)

    def _seconds(self, steps: int) -> float:
        """Of so many steps with what is in flight now."""
        return steps * self._costs.step(len(self._ends)) + self._costs.kv_s * self._read(steps)

    def _read(self, steps: int) -> int:
        """Tokens whose keys and values so many steps read: a response is longer at each step."""
        return steps * self._held + len(self._ends) * steps * (steps - 1) // 2
