"""Chat messages as a row holds them, and what must hold before a chat template sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from copris_lightning.datamodules.prompts.literals import Unreadable, plain_text, shown


class UnusablePrompt(ValueError):
    """Why a prompt cannot be used; a predicate, such as "is empty"."""


def conversation(value: Any) -> tuple[dict[str, Any], ...]:
    """The messages of one conversation, each with a role and with text for its content.

    Content that is a list of text parts is joined, without anything between the parts. Fields that
    are ``None`` are left out, since tables fill up with them. An assistant's message that only
    calls tools has the content ``""``.

    Raises:
        UnusablePrompt: it is something else; says which message.
    """
    if not isinstance(value, list | tuple):
        raise UnusablePrompt(f"is {shown(value)}; it must be text or a list of chat messages")
    if not value:
        raise UnusablePrompt("is a list without messages")
    messages = tuple(_message(m, f"message {n} of {len(value)}") for n, m in enumerate(value, 1))
    if messages[-1]["role"] == "user" and not messages[-1]["content"]:
        raise UnusablePrompt("ends with an empty user message")
    return messages


def _message(value: Any, which: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UnusablePrompt(f"holds {shown(value)} as {which}; it must have role and content")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or not role:
        given = f"is {shown(role)}" if "role" in value else "is missing"
        raise UnusablePrompt(f"has {which} whose role {given}")
    if content is None and role == "assistant" and value.get("tool_calls"):
        content = ""
    if content is None:
        given = "is null" if "content" in value else "is missing"
        raise UnusablePrompt(f"has {which} whose content {given}")
    if isinstance(content, list | tuple):
        content = "".join(_part(part, which) for part in content)
    if not isinstance(content, str):
        raise UnusablePrompt(
            f"has {which} whose content is {shown(content)}; it must be text or a list of parts"
        )
    kept = {str(key): field for key, field in value.items() if field is not None}
    try:
        return {**kept, "role": plain_text(role), "content": plain_text(content)}
    except Unreadable as error:
        raise UnusablePrompt(f"has {which} that {error}") from None


def _part(part: Any, which: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        given = f"of type {kind!r}" if isinstance(kind, str) else f"that is {shown(part)}, untyped"
        raise UnusablePrompt(f"has {which} with a part {given}; only parts of type 'text' are used")
    text = part.get("text")
    if not isinstance(text, str):
        raise UnusablePrompt(f"has {which} with a text part whose text is {shown(text)}")
    return text
