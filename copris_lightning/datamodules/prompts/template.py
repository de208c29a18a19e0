"""How a conversation becomes a prompt: settings of the chat template, and rendering by it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

# The environment that templates are rendered in; there is no public way to ask for it.
from transformers.utils.chat_template_utils import _compile_jinja_template

from copris_lightning.datamodules.prompts.messages import UnusablePrompt, conversation
from copris_lightning.errors import ConfigurationError

_HELD = "task.template"
_OWN_ROLES = ("assistant", "tool", "function", "ipython")
"""Roles whose messages templates rewrite: reasoning is cut, calls and results are wrapped."""
_SYSTEM_ROLES = ("system", "developer")
_OFFERED = {"messages", "tools", "documents", "add_generation_prompt"}
"""What a template always gets."""


@dataclass(frozen=True)
class Template:
    """How conversations are rendered by the model's chat template, in training and evaluation.

    Args:
        system: a system prompt in front of conversations that do not begin with one.
        tools: JSON schemas of the tools that the template describes to the model.
        options: further variables of the template, such as ``enable_thinking: false``.
        trailing_assistant: what becomes of a conversation whose last message is the assistant's,
            as in data made for supervised training, where it is the solution: ``refuse`` it;
            ``drop`` the assistant's messages after the last other one, so that the model answers
            that; or let the model ``continue`` the last message (rewards and the ledger see what
            the model adds).
        special_tokens: ``keep`` the special tokens of responses in the text that rewards and the
            ledger see, or ``strip`` them.

    Raises:
        ConfigurationError: a setting that cannot work; names it.
    """

    system: str | None = None
    tools: list[dict[str, Any]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    trailing_assistant: Literal["refuse", "drop", "continue"] = "refuse"
    special_tokens: Literal["keep", "strip"] = "keep"

    def __post_init__(self) -> None:
        if self.system is not None and (not isinstance(self.system, str) or not self.system):
            raise ConfigurationError(f"system={self.system!r} must be text, or null for none")
        tools = self.tools
        if tools is not None and not (
            isinstance(tools, list) and tools and all(isinstance(t, dict) and t for t in tools)
        ):
            raise ConfigurationError(
                f"tools={tools!r} must be a list of JSON schemas, or null for none"
            )
        if not isinstance(self.options, dict):
            raise ConfigurationError(f"options={self.options!r} must map names to values")
        for name in self.options:
            if name in ("system", "tools"):
                raise ConfigurationError(f"options.{name}: set {name} instead")
            if name in _reserved():
                raise ConfigurationError(
                    f"options.{name} cannot be set: it is no variable of a chat template "
                    "but decided here"
                )
        for name, value, choices in (
            ("trailing_assistant", self.trailing_assistant, ("refuse", "drop", "continue")),
            ("special_tokens", self.special_tokens, ("keep", "strip")),
        ):
            if value not in choices:
                raise ConfigurationError(f"{name}={value!r} must be {' or '.join(choices)}")

    @property
    def shaping(self) -> list[str]:
        """The settings that change what is rendered, and are set."""
        given = {"system": self.system, "tools": self.tools, "options": self.options}
        return [f"{_HELD}.{name}" for name, value in given.items() if value]


class ChatRenderer:
    """Renders conversations by a tokenizer's chat template.

    Args:
        tokenizer: the model's.
        template: settings.

    Raises:
        ConfigurationError: the template is missing or broken, or has no use for a setting.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        if not tokenizer.chat_template:
            raise ConfigurationError(
                "the tokenizer of the model has no chat template; give text prompts, "
                "or a model with one"
            )
        self._tokenizer = tokenizer
        self._template = template
        tools: Any = template.tools
        try:
            names = _variables(tokenizer.get_chat_template(tools=tools))
        except (ValueError, jinja2.TemplateError) as error:
            raise ConfigurationError(
                f"the chat template of the model cannot be used: {error}"
            ) from error
        if tools and "tools" not in names:
            raise ConfigurationError(
                f"{_HELD}.tools is set, but the chat template of the model describes no tools"
            )
        unknown = sorted(set(template.options) - names)
        if unknown:
            known = sorted(names - _OFFERED - set(tokenizer.special_tokens_map))
            raise ConfigurationError(
                f"{_HELD}.options.{unknown[0]}: the chat template of the model has no "
                f"such variable; it has {', '.join(known) or 'none'}"
            )

    def __call__(self, messages: Any) -> str:
        """The text of a conversation up to where the response begins.

        Raises:
            UnusablePrompt: it is no conversation, or the template refuses it or loses a message.
        """
        chat = list(conversation(messages))
        if chat[-1]["role"] == "assistant":
            chat = self._without_trailing(chat)
        if self._template.system and chat[0]["role"] not in _SYSTEM_ROLES:
            chat.insert(0, {"role": "system", "content": self._template.system})
        goes_on = chat[-1]["role"] == "assistant"
        if goes_on and not chat[-1]["content"]:
            raise UnusablePrompt("ends with an assistant's message without text to go on from")
        text = self._render(chat, goes_on)
        visible = _squeezed(text)
        for message in chat:
            role = message["role"]
            if role not in _OWN_ROLES and _squeezed(message["content"]) not in visible:
                raise UnusablePrompt(
                    f"loses its {role} message: the chat template leaves out "
                    f"{message['content'][:40]!r}"
                )
        return text

    def _without_trailing(self, chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rule = self._template.trailing_assistant
        if rule == "refuse":
            raise UnusablePrompt(
                "ends with the assistant's message, which the model would be asked to answer; set "
                f"{_HELD}.trailing_assistant to drop it, or to continue it"
            )
        if rule == "drop":
            while chat and chat[-1]["role"] == "assistant":
                chat = chat[:-1]
            if not any(message["role"] not in _SYSTEM_ROLES for message in chat):
                raise UnusablePrompt("holds nothing to answer but the assistant's own messages")
        return chat

    def _render(self, chat: list[dict[str, Any]], goes_on: bool) -> str:
        tools: Any = self._template.tools
        try:
            text = self._tokenizer.apply_chat_template(
                chat,
                tools=tools,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                tokenize=False,
                **self._template.options,
            )
        except Exception as error:  # a template is a program of the checkpoint's
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise UnusablePrompt(f"is refused by the chat template: {kind}{error}") from error
        assert isinstance(text, str)
        return text


def _reserved() -> set[str]:
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return {*names, "messages"} - {"documents", "kwargs"}


def _variables(source: str) -> set[str]:
    """The names that a template reads without setting them."""
    environment = _compile_jinja_template(source).environment
    found = jinja2.meta.find_undeclared_variables(environment.parse(source))
    return found - set(environment.globals)


def _squeezed(text: str) -> str:
    return "".join(text.split())
