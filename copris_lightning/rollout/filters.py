"""Which complete groups are worth training on."""

from __future__ import annotations

from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.errors import RolloutError


class ZeroVarianceFilter:
    """DAPO's dynamic sampling: a group of equal rewards has no advantage, so another is rolled out.

    Rewards are compared exactly (a standard deviation may round to something above zero). A group
    with one that is missing is accepted, for its trajectory to be quarantined and counted. What
    is dropped biases the prompts towards those of middling difficulty: that is its purpose.

    Args:
        max_dropped: groups in a row that may be dropped, >= 1.
        reward_name: for the error.

    Source: DAPO, arXiv 2503.14476, section 3.2.
    """

    def __init__(self, max_dropped: int, reward_name: str) -> None:
        self._max_dropped = max_dropped
        self._reward_name = reward_name
        self._in_a_row = 0

    def __call__(self, group: PromptGroup) -> bool:
        """Whether the group's rewards differ.

        Raises:
            RolloutError: too many groups in a row did not; names the reward.
        """
        reward, *others = {verdict.reward for verdict in group.verdicts}
        if others or reward is None:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row > self._max_dropped:
            raise RolloutError(
                f"{self._in_a_row} groups in a row got equal rewards from {self._reward_name}, the "
                f"last ({reward:g} for every response to prompt "
                f"{group.trajectories[0].prompt_id!r}) too: nothing to learn from. Is "
                "task.scoring.reward right, are the prompts neither too easy nor too hard? Raise "
                f"credit.max_dropped_groups={self._max_dropped}, or set "
                "credit.drop_zero_variance=false"
            )
        return False
