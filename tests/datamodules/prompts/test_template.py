"""Conversations on their way through a chat template: settings, and what is refused."""

from __future__ import annotations

import pytest
import yaml
from jsonargparse import ArgumentParser

from copris_lightning import Template
from copris_lightning.datamodules.prompts.stream import PromptEncoder
from copris_lightning.errors import ConfigurationError
from copris_lightning.quickstart.warm_start import character_tokenizer
from copris_lightning.rollout.rewards import Prompt

KEY = "task.prompts"
CHAT = (
    "{% if tools %}T:{{ tools[0]['name'] }};{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}[{{ m['content'] | upper }}]"
    "{% elif m['role'] in ('system', 'user', 'assistant') %}"
    "{% if m['role'] == 'user' and loop.previtem and loop.previtem['role'] == 'user' %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] | trim }}</>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "no think{% endif %}"
)
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}


def rendered(*messages, chat=CHAT, template=None):
    """The text that the model gets for a conversation."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = chat
    encode = PromptEncoder(tokenizer, max_prompt_tokens=200, key=KEY, template=template)
    return tokenizer.decode(encode(Prompt("a7", messages=messages)))


def refused(*messages, **settings):
    with pytest.raises(ConfigurationError) as caught:
        rendered(*messages, **settings)
    return str(caught.value)


# -- settings ----------------------------------------------------------------------------


def test_a_system_prompt_goes_in_front():
    template = Template(system="be kind")
    assert rendered(USER, template=template) == "<system>be kind</><user>hi</><assistant>"


def test_a_conversation_keeps_a_system_prompt_of_its_own():
    own = {"role": "system", "content": "be short"}
    text = rendered(own, USER, template=Template(system="be kind"))
    assert text == "<system>be short</><user>hi</><assistant>"


def test_options_reach_the_template():
    assert rendered(USER) == "<user>hi</><assistant>"
    template = Template(options={"enable_thinking": False})
    assert rendered(USER, template=template) == "<user>hi</><assistant>no think"


def test_tools_reach_the_template():
    assert rendered(USER, template=Template(tools=[{"name": "add"}])).startswith("T:add;<user>")


def test_an_option_that_the_template_has_not_is_refused_with_those_it_has():
    message = refused(USER, template=Template(options={"enable_thinkin": False}))
    assert "task.template.options.enable_thinkin" in message
    assert message.endswith("it has enable_thinking")


def test_tools_that_the_template_would_not_show_are_refused():
    plain = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    message = refused(USER, chat=plain, template=Template(tools=[{"name": "add"}]))
    assert "task.template.tools is set, but" in message


def test_a_template_that_cannot_be_parsed_is_a_configuration_error():
    message = refused(USER, chat="{% for %}")
    assert "the chat template of the model cannot be used" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"tokenize": False}}, "options.tokenize cannot be set"),
        ({"options": {"add_generation_prompt": False}}, "options.add_generation_prompt cannot"),
        ({"options": {"return_dict": False}}, "options.return_dict cannot be set"),
        ({"options": {"messages": []}}, "options.messages cannot be set"),
        ({"options": {"tools": []}}, "options.tools: set tools"),
        ({"options": {"system": "x"}}, "options.system: set system"),
        ({"options": ["x"]}, r"options=\['x'\] must map"),
        ({"system": ""}, "system='' must be text"),
        ({"tools": []}, r"tools=\[\] must be a list"),
        ({"tools": ["add"]}, r"tools=\['add'\] must be a list"),
        ({"special_tokens": "drop"}, "special_tokens='drop' must be keep or strip"),
        ({"trailing_assistant": "no"}, "trailing_assistant='no' must be refuse or drop"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_key(settings, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        Template(**settings)


def test_the_command_line_reads_it():
    parser = ArgumentParser()
    parser.add_argument("--template", type=Template | None)
    text = "{system: be kind, tools: [{name: add}], options: {enable_thinking: false}}"
    read = parser.instantiate_classes(parser.parse_args(["--template", text])).template
    given = yaml.safe_load(text)
    assert read == Template(given["system"], given["tools"], given["options"])


# -- what comes last -----------------------------------------------------------------------


def test_a_solution_in_the_prompt_is_refused_with_the_setting_that_helps():
    message = refused(USER, ANSWER)
    assert message.startswith(f"{KEY}: prompt 'a7' ends with the assistant's message")
    assert "task.template.trailing_assistant" in message


@pytest.mark.parametrize(
    ("last", "text"),
    [
        ([ANSWER], "<user>hi</><assistant>"),
        ([ANSWER, ANSWER], "<user>hi</><assistant>"),
        ([ANSWER, USER, ANSWER], "<user>hi</><assistant>yes</><user>hi</><assistant>"),
        (
            [ANSWER, {"role": "tool", "content": "t"}, ANSWER],
            "<user>hi</><assistant>yes</>[T]<assistant>",
        ),
    ],
)
def test_the_solution_can_be_dropped(last, text):
    assert rendered(USER, *last, template=Template(trailing_assistant="drop")) == text


@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "s"}]])
def test_a_conversation_of_the_assistants_alone_has_nothing_to_answer(before):
    message = refused(*before, ANSWER, template=Template(trailing_assistant="drop"))
    assert "'a7' holds nothing to answer" in message


def test_the_last_message_can_be_continued():
    template = Template(trailing_assistant="continue")
    assert rendered(USER, ANSWER, template=template) == "<user>hi</><assistant>yes"
    assert rendered(USER, template=template) == "<user>hi</><assistant>"


def test_there_must_be_something_to_continue():
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    message = refused(USER, calls, template=Template(trailing_assistant="continue"))
    assert "without text to go on from" in message


@pytest.mark.parametrize("rule", ["refuse", "drop", "continue"])
def test_a_tools_result_may_come_last(rule):
    messages = [USER, ANSWER, {"role": "tool", "content": "t"}]
    text = rendered(*messages, template=Template(trailing_assistant=rule))
    assert text == "<user>hi</><assistant>yes</>[T]<assistant>"


# -- messages ------------------------------------------------------------------------------


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "3+"}, "4", {"type": "text", "text": "=", "image": None}]
    assert rendered({"role": "user", "content": parts}) == "<user>3+4=</><assistant>"


def test_a_message_that_only_calls_tools_needs_no_content():
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert rendered(USER, calls, USER) == "<user>hi</><assistant></><user>hi</><assistant>"


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("hi", "holds the text 'hi' as message 2 of 2"),
        (None, "holds null as message 2 of 2"),
        ({"content": "x"}, "message 2 of 2 whose role is missing"),
        ({"role": 3, "content": "x"}, "message 2 of 2 whose role is the number 3"),
        ({"role": "", "content": "x"}, "message 2 of 2 whose role is the text ''"),
        ({"role": "user"}, "message 2 of 2 whose content is missing"),
        ({"role": "user", "content": None}, "message 2 of 2 whose content is null"),
        ({"role": "assistant", "content": None}, "message 2 of 2 whose content is null"),
        ({"role": "user", "content": 3}, "content is the number 3; it must be text or a list"),
        ({"role": "user", "content": {"a": 1}}, "content is an object"),
        ({"role": "user", "content": ""}, "ends with an empty user message"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [{"text": "x"}]}, "a part that is an object, untyped"),
        ({"role": "user", "content": [7]}, "a part that is the number 7, untyped"),
        ({"role": "user", "content": [{"type": "text"}]}, "a text part whose text is null"),
        ({"role": "user", "content": "\ud800"}, r"holds \ud800, half of a character"),
        (
            {"role": "human", "content": "hello"},
            "loses its human message: the chat template leaves out 'hello'",
        ),
        ({"role": "user", "content": "hello"}, "Conversation roles must alternate"),
        ({"role": "tool", "content": "\x00"}, "cannot be tokenized"),
    ],
)
def test_a_message_that_cannot_be_used_is_named(message, complaint):
    found = refused(USER, message)
    assert found.startswith(f"{KEY}: prompt 'a7' ")
    assert complaint in found


def test_a_template_that_loses_the_system_prompt_is_refused():
    chat = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    message = refused(USER, chat=chat, template=Template(system="be kind"))
    assert "loses its system message: the chat template leaves out 'be kind'" in message


@pytest.mark.parametrize("chat", ["{{ messages[0].content + 1 }}", "{{ messages[9].x.y }}"])
def test_whatever_a_template_raises_is_an_error_of_the_prompt(chat):
    assert f"{KEY}: prompt 'a7' is refused by the chat template: " in refused(USER, chat=chat)
