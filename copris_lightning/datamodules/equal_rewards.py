"""Says aloud that a reward does not tell responses apart, so that nothing can be learnt from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning.pytorch.utilities import rank_zero_warn

from copris_lightning.core.trajectory import PromptGroup
from copris_lightning.rollout.rewards import Prompt


class EqualRewards:
    """Looks at the first batches of a run, until a group's rewards differ; warns once.

    An answer that is never equal to what it is compared with (``42`` and ``"42"``) looks like a
    model that knows nothing: the loss is 0, and the run goes on to its end. It may also be a task
    that is too hard or too easy, so it is a warning.

    Args:
        reward_name: for the warning.
        decode: response tokens to the text that the reward gets.
        prompt: the prompt at an index of the source.
        batches: how many to look at before warning that all rewards are equal.
        groups: how many groups to look at before warning that none has rewards that differ, where
            they differ between groups. (A few such groups are nothing unusual.)
    """

    def __init__(
        self,
        reward_name: str,
        decode: Callable[[Sequence[int]], str],
        prompt: Callable[[int], Prompt],
        *,
        batches: int = 3,
        groups: int = 64,
    ) -> None:
        self._reward_name = reward_name
        self._decode = decode
        self._prompt = prompt
        self._batches = batches
        self._groups = groups
        self._seen_batches = self._seen_groups = self._seen = self._cut = 0
        self._values: set[float] = set()
        self._is_done = False

    def __call__(self, groups: Sequence[PromptGroup]) -> None:
        """Look at a batch whose rewards are known."""
        if self._is_done:
            return
        for group in groups:
            rows = [t for t in group.trajectories if t.reward is not None]
            values = {t.reward for t in rows if t.reward is not None}
            if len(values) > 1:
                self._is_done = True
                return
            self._values |= values
            self._seen_groups += len(rows) > 1
            self._seen += len(rows)
            self._cut += sum(t.finish_reason == "length" for t in rows)
        self._seen_batches += 1
        if len(self._values) == 1 and self._seen_batches >= self._batches:
            self._warn(groups, f"gave {next(iter(self._values)):g} to all of the {self._seen}")
        elif len(self._values) > 1 and self._seen_groups >= self._groups:
            self._warn(groups, f"tells no prompt's responses apart in the {self._seen}")

    def _warn(self, groups: Sequence[PromptGroup], what: str) -> None:
        self._is_done = True
        rank_zero_warn(
            f"task.scoring.reward: {self._reward_name} {what} trajectories of the first "
            f"{self._seen_batches} batches ({self._cut} of them reached max_new_tokens): equal "
            "rewards teach nothing. Is the answer what the reward compares with, in the same "
            "form? Are the prompts too hard, or too easy? For example, "
            + "; ".join(self._example(group) for group in groups[:2])
        )

    def _example(self, group: PromptGroup) -> str:
        prompt = self._prompt(group.prompt_index)
        response = self._decode(group.trajectories[0].tokens)
        return (
            f"prompt {prompt.id!r} has the answer {_short(prompt.answer)} and got the response "
            f"{_short(response)}"
        )


def _short(value: object) -> str:
    """Both ends of a long text: an answer often stands at the end."""
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-80:]}"
