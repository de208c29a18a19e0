"""Where prompts come from: data sets, and the endless shuffled stream that training draws on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt
from copris_lightning.rollout.scheduler import QueuedPrompt


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


class DatasetPrompts:
    """Prompts from a data set of the hub, or from local JSON Lines, CSV or Parquet files.

    Args:
        path: as for ``datasets.load_dataset``: a hub name, a folder, or ``json``, ``csv``,
            ``parquet`` together with ``data_files``.
        prompt_column: holds the prompt: text, or a list of chat messages.
        answer_column: holds what the reward compares with; ``null`` if there is none.
        id_column: holds the prompt's id; by default the row number is used.
        name: the data set's configuration.
        split: which part of it.
        data_files: local files.
        as_chat: wrap a text prompt as one user message, for the model's chat template.
        instruction: appended to a text prompt.

    Raises:
        ConfigurationError: the data set cannot be loaded or lacks a column.
    """

    def __init__(
        self,
        path: str,
        prompt_column: str = "prompt",
        answer_column: str | None = "answer",
        id_column: str | None = None,
        name: str | None = None,
        split: str = "train",
        data_files: str | list[str] | None = None,
        as_chat: bool = False,
        instruction: str = "",
    ) -> None:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            self._rows = load_dataset(path, name=name, split=split, data_files=data_files)
        except (OSError, ValueError, DatasetsError) as error:
            raise ConfigurationError(
                f"prompts.init_args.path={path!r} (split {split!r}) cannot be loaded: "
                f"{error.__cause__ or error}"
            ) from error
        for key, column in (
            ("prompt_column", prompt_column),
            ("answer_column", answer_column),
            ("id_column", id_column),
        ):
            if column is not None and column not in self._rows.column_names:
                raise ConfigurationError(
                    f"prompts.init_args.{key}={column!r}: the data set has the columns "
                    f"{', '.join(self._rows.column_names)}"
                )
        self._prompt_column = prompt_column
        self._answer_column = answer_column
        self._id_column = id_column
        self._as_chat = as_chat
        self._instruction = instruction

    def __len__(self) -> int:
        """Rows of the data set."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Prompt:
        """The prompt of a row; other columns are in its ``extra``."""
        row = dict(self._rows[index])
        content = row.pop(self._prompt_column)
        answer = row.pop(self._answer_column) if self._answer_column else None
        name = str(row.pop(self._id_column)) if self._id_column else f"{index:08d}"
        if not isinstance(content, str):
            messages = tuple(dict(message) for message in content)
            return Prompt(name, messages=messages, answer=answer, extra=row)
        text = content + self._instruction
        if self._as_chat:
            message = {"role": "user", "content": text}
            return Prompt(name, messages=(message,), answer=answer, extra=row)
        return Prompt(name, text=text, answer=answer, extra=row)


class PromptEncoder:
    """Turns prompts into tokens. Responses are never encoded: their tokens are the engine's.

    Args:
        tokenizer: the model's.
        max_prompt_tokens: longest prompt that is let through.
        key: the YAML key of the prompts, for errors.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int, key: str
    ) -> None:
        self._tokenizer = tokenizer
        self._max_prompt_tokens = max_prompt_tokens
        self._key = key

    def __call__(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of the prompt.

        Raises:
            ConfigurationError: chat messages without a chat template, an empty prompt, or one
                that is too long.
        """
        ids = tuple(self._encode(prompt))
        if not ids:
            raise ConfigurationError(f"{self._key}: prompt {prompt.id!r} is empty")
        if len(ids) > self._max_prompt_tokens:
            raise ConfigurationError(
                f"{self._key}: prompt {prompt.id!r} has {len(ids)} tokens, more than "
                f"data.init_args.max_prompt_tokens={self._max_prompt_tokens}; raise that, or set "
                "data.init_args.skip_long_prompts=true to leave such prompts out"
            )
        return ids

    def fits(self, prompt: Prompt) -> bool:
        """Whether the prompt is short enough."""
        return len(self._encode(prompt)) <= self._max_prompt_tokens

    def _encode(self, prompt: Prompt) -> list[int]:
        if (prompt.text is None) == (prompt.messages is None):
            raise ConfigurationError(
                f"{self._key}: prompt {prompt.id!r} needs either text or messages"
            )
        if prompt.messages is None:
            return list(self._tokenizer(prompt.text)["input_ids"])
        if not self._tokenizer.chat_template:
            raise ConfigurationError(
                f"{self._key}: prompt {prompt.id!r} holds chat messages, but the tokenizer of "
                "model.init_args.model has no chat template; give text prompts, or a model with one"
            )
        # The template writes the special tokens itself: tokenizing its text would double them.
        encoded: Any = self._tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return list(encoded["input_ids"])


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
        key: str = "data.init_args.prompts",
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
