"""One look at every prompt before anything boots: what cannot be used is named all at once."""

from __future__ import annotations

from typing import Any

from copris_lightning.datamodules.prompts.ids import check_ids
from copris_lightning.datamodules.prompts.literals import shown
from copris_lightning.datamodules.prompts.messages import UnusablePrompt
from copris_lightning.datamodules.prompts.stream import Located, PromptEncoder, PromptSource
from copris_lightning.errors import ConfigurationError
from copris_lightning.rollout.rewards import Prompt

_SHOWN = 10
"""Problems that an error spells out; the others are counted."""


def usable_prompts(source: PromptSource, encode: PromptEncoder, *, skip_long: bool) -> list[int]:
    """Indices of the prompts to use, after a look at every one.

    Args:
        source: the prompts.
        encode: makes their tokens.
        skip_long: leave prompts that are too long out, rather than refusing them.

    Raises:
        ConfigurationError: some cannot be used, with their number and the place, id and fault of
            the first; or all are left out; or a setting of the template cannot apply to them.
    """
    size = _size(source, encode.key)
    usable: list[int] = []
    ids: list[tuple[int, str]] = []
    problems: list[str] = []
    texts = 0
    for index in range(size):
        prompt: Prompt | None = None
        try:
            prompt = _prompt(source, index)
            tokens = encode.tokens(prompt)
            if skip_long and len(tokens) > encode.max_prompt_tokens:
                continue
            encode.check_length(tokens)
        except UnusablePrompt as error:
            problems.append(_line(source, index, prompt, error))
            continue
        usable.append(index)
        ids.append((index, prompt.id))
        texts += prompt.messages is None
    if problems:
        more = len(problems) - _SHOWN
        raise ConfigurationError(
            f"{encode.key}: {len(problems)} of {size} prompts cannot be used\n  "
            + "\n  ".join(problems[:_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
        )
    if size and not usable:
        raise ConfigurationError(
            f"{encode.key}: the prompt set is empty, since each of the {size} prompts is longer "
            f"than task.max_prompt_tokens={encode.max_prompt_tokens}"
        )
    check_ids(ids, encode.key)
    if texts and encode.template.shaping:
        raise ConfigurationError(
            f"{encode.template.shaping[0]} cannot apply to {encode.key}: {texts} of {size} prompts "
            "are text, which no chat template renders; give messages (as_chat=true does), or unset "
            "it"
        )
    return usable


class _Refused(UnusablePrompt):
    """A prompt that its source itself refuses, saying where it is."""


def _prompt(source: PromptSource, index: int) -> Prompt:
    try:
        prompt: Any = source[index]
    except ConfigurationError as error:
        raise _Refused(str(error)) from error
    except Exception as error:  # a user's source may raise anything
        raise UnusablePrompt(f"cannot be read: it raised {error!r}") from error
    if not isinstance(prompt, Prompt):
        raise UnusablePrompt(f"is {shown(prompt)}, not a copris_lightning.Prompt")
    if not isinstance(prompt.id, str) or not prompt.id:
        given = "empty" if prompt.id == "" else shown(prompt.id)
        raise UnusablePrompt(f"has an id that is {given}; it must be text")
    return prompt


def _line(source: PromptSource, index: int, prompt: Prompt | None, error: UnusablePrompt) -> str:
    located = isinstance(source, Located)
    if isinstance(error, _Refused) and located:
        return str(error)
    place = source.place_of(index) if isinstance(source, Located) else f"index {index}"
    name = "the prompt" if prompt is None else f"prompt {prompt.id!r}"
    return f"{place}: {name} {error}"


def _size(source: PromptSource, key: str) -> int:
    try:
        return len(source)
    except Exception as error:  # a source of the user's may raise anything: passed on as cause
        raise ConfigurationError(f"{key}: its length cannot be asked for: {error!r}") from error
