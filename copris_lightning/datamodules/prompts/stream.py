"""Prompts on their way to the engine: sources, their tokens, and the stream training draws on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from copris_lightning.datamodules.prompts.literals import shown
from copris_lightning.datamodules.prompts.messages import UnusablePrompt
from copris_lightning.datamodules.prompts.template import ChatRenderer, Template
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.task import QueuedPrompt


class PromptSource(Protocol):
    """A sized, indexable collection of prompts. A class of the user's, by ``class_path``.

    The annotations are wide because the command line compares them with the class's own, and a
    class without annotations should do.
    """

    def __len__(self) -> Any:
        """How many prompts there are."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """The :class:`Prompt` at ``0 <= index < len(self)``, always the same one."""
        ...


@runtime_checkable
class Located(Protocol):
    """What a source may have besides: the place of a prompt, for errors."""

    def place_of(self, index: int) -> str:
        """File, line and column, say, of the prompt at an index."""
        ...


class PromptEncoder:
    """Turns prompts into tokens. Responses are never encoded: their tokens are the engine's.

    Args:
        tokenizer: the model's.
        max_prompt_tokens: longest prompt that is let through.
        key: the name of the prompts, for errors.
        template: how conversations are rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_tokens: int,
        key: str,
        template: Template | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.key = key
        self.template = template or Template()
        self._renderer: ChatRenderer | None = None

    def __call__(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt.

        Raises:
            ConfigurationError: chat messages without a chat template, a prompt that is empty or
                malformed, or one that is too long.
        """
        try:
            ids = self.tokens(prompt)
            self.check_length(ids)
        except UnusablePrompt as error:
            raise ConfigurationError(f"{self.key}: prompt {prompt.id!r} {error}") from error
        return ids

    def check_length(self, token_ids: Sequence[int]) -> None:
        """Refuse a prompt that is too long.

        Raises:
            UnusablePrompt: says how long it is, and which settings help.
        """
        if len(token_ids) > self.max_prompt_tokens:
            raise UnusablePrompt(
                f"has {len(token_ids)} tokens, more than "
                f"task.max_prompt_tokens={self.max_prompt_tokens}; raise that, or set "
                "task.skip_long_prompts=true to leave such prompts out"
            )

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt, however many.

        Raises:
            UnusablePrompt: says what is wrong with this prompt.
            ConfigurationError: no conversation can be rendered.
        """
        if (prompt.text is None) == (prompt.messages is None):
            raise UnusablePrompt("needs either text or messages")
        if prompt.messages is None:
            if not isinstance(prompt.text, str):
                raise UnusablePrompt(f"is {shown(prompt.text)}; it must be text")
            if not prompt.text:
                raise UnusablePrompt("is empty")
            return self._ids(prompt.text, add_special_tokens=True)
        if self._renderer is None:
            try:
                self._renderer = ChatRenderer(self._tokenizer, self.template)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"{self.key}: prompt {prompt.id!r} holds chat messages, but {error}"
                ) from error
        # The template writes the special tokens itself: the tokenizer would double them.
        return self._ids(self._renderer(prompt.messages), add_special_tokens=False)

    def _ids(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            ids: Any = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # a tokenizer of the checkpoint's own may raise anything
            raise UnusablePrompt(f"cannot be tokenized: {type(error).__name__}: {error}") from error
        if not ids:
            raise UnusablePrompt("is empty")
        return tuple(ids)


class PromptStream:
    """Prompts in shuffled order, epoch after epoch or once; remembers where it is.

    Args:
        source: the prompts.
        encode: to tokens.
        seed: of the shuffling; ``None`` keeps the source's order.
        epochs: how often to go through the source; ``None`` for ever.
        indices: which prompts to use; all by default.

    Raises:
        ConfigurationError: there are no prompts.
    """

    def __init__(
        self,
        source: PromptSource,
        encode: PromptEncoder,
        *,
        seed: int | None = None,
        epochs: int | None = None,
        indices: list[int] | None = None,
        key: str = "task.prompts",
    ) -> None:
        self._indices = list(range(len(source))) if indices is None else indices
        if not self._indices:
            raise ConfigurationError(f"{key}: the prompt set is empty")
        self._source = source
        self._encode = encode
        self._seed = seed
        self._epochs = epochs
        self._taken = 0
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._indices)

    def next(self) -> QueuedPrompt | None:
        """The next prompt, or ``None`` after the last epoch."""
        epoch, position = divmod(self._taken, len(self._indices))
        if self._epochs is not None and epoch >= self._epochs:
            return None
        self._taken += 1
        return self._queued(self._epoch_order(epoch)[position])

    def prompt(self, index: int) -> Prompt:
        """The prompt at an index of the source."""
        prompt: Prompt = self._source[index]
        return prompt

    def _queued(self, index: int) -> QueuedPrompt:
        prompt = self.prompt(index)
        return QueuedPrompt(prompt, index, self._encode(prompt))

    def __iter__(self) -> Iterator[QueuedPrompt]:
        """All prompts once, in the source's order; does not move the stream."""
        return (self._queued(index) for index in self._indices)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream was."""
        self._taken = state["taken"]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return self._indices
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
            permutation = torch.randperm(len(self._indices), generator=generator).tolist()
            self._order = (epoch, [self._indices[i] for i in permutation])
        return self._order[1]
