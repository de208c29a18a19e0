"""What is wrong with a config, in one line: key, value, and what it must be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from copris_lightning.errors import ConfigurationError

_EXPECTED = re.compile(
    r"Expected an? (<class '[^']+'>|typing\.Literal\[.+?\])(?:\. Got value: (.*))?", re.S
)
_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "str": "text",
}


class CoprisParser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line instead of the usage of every option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong.

        Raises:
            ConfigurationError: names the innermost key, its value and what it must be.
        """
        if not self.exit_on_error:  # a parser within another one, which will say it
            super().error(message, ex)
        ours = configuration_error(ex)
        raise ConfigurationError(str(ours) if ours else explain(message)) from ex


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The error itself, or the one it wraps: the parser wraps what a class raises."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


# -- the parser's errors -------------------------------------------------------------------


@dataclasses.dataclass
class _Line:
    """A line of a nested message, with the lines indented below it."""

    text: str
    below: list[_Line] = dataclasses.field(default_factory=list)


def explain(message: str) -> str:
    """The innermost of jsonargparse's nested errors, with the whole key that it is about.

    A value that fits none of several types has an error for each: those that got furthest into
    the config are told.
    """
    found = sorted(_leaves(_tree(message), ""), key=lambda leaf: -leaf[0].count("."))
    if not found:
        return message
    key, depth = found[0][0], found[0][0].count(".")
    texts = list(dict.fromkeys(text for k, text in found if k.count(".") == depth))
    expected = [m for m in map(_EXPECTED.fullmatch, texts) if m]
    if len(expected) < len(texts):  # what is not about types says more
        texts = [text for text in texts if not _EXPECTED.fullmatch(text)]
        return f"{key}: {'; '.join(texts)}" if key else "; ".join(texts)
    value = next((m[2] for m in expected if m[2] is not None), None) or _given_value(message)
    kinds = " or ".join(dict.fromkeys(_kind(m[1]) for m in expected))
    return f"{key}={value} must be {kinds}"


def _tree(message: str) -> list[_Line]:
    root = _Line("")
    stack = [(-1, root)]
    for line in message.splitlines():
        text = line.strip()
        if not text:
            continue
        indent = len(line) - len(line.lstrip())
        while stack[-1][0] >= indent:
            stack.pop()
        node = _Line(text.removeprefix("- "))
        stack[-1][1].below.append(node)
        stack.append((indent, node))
    return root.below


def _leaves(
    lines: Sequence[_Line], key: str, *, within: str = "", exact: str = ""
) -> Iterator[tuple[str, str]]:
    """Keys and messages of a tree's ends.

    Args:
        lines: of one level.
        key: what they are about.
        within: where the keys that they name are; by default ``key``.
        exact: the types of the union they are in, as text.
    """
    prefix = within or key
    for line in lines:
        if line.text.startswith("Subtypes: "):
            exact = line.text
        if match := re.match(r'Parser key "(.+?)":(.*)', line.text):
            inner = f"{prefix}.{match[1]}" if prefix else match[1]
            if line.below:
                yield from _leaves(line.below, inner)
            else:
                yield inner, match[2].strip()
        elif match := re.match(r"Problem with given class_path '(.+?)':", line.text):
            is_value = f"<class '{match[1]}'>" in exact and _is_dataclass(match[1])
            yield from _leaves(line.below, key, within="" if is_value else f"{key}.init_args")
        elif match := re.match(r"Option '(.+?)' is not accepted", line.text):
            yield f"{prefix}.{match[1]}", "there is no such setting"
        elif line.text == "Errors:":
            yield from _leaves(line.below, key, exact=exact)
        elif not re.match("Does not validate|Subtypes:|Given value", line.text):
            yield key, line.text
            yield from _leaves(line.below, key)


def _is_dataclass(path: str) -> bool:
    """Whether a class is written in YAML without ``init_args``."""
    module, _, name = path.rpartition(".")
    return dataclasses.is_dataclass(getattr(import_module(module), name, None))


def _given_value(message: str) -> str:
    values: list[str] = re.findall(r"Given value: (.*)", message)
    nested = re.fullmatch(r"NestedArg\(key='.+?', val='(.*)'\)", values[0]) if values else None
    return nested[1] if nested else values[0] if values else ""


def _kind(text: str) -> str:
    if match := re.fullmatch(r"<class '(?:.+\.)?(\w+)'>", text):
        return _NAMES.get(match[1], match[1])
    return " or ".join(re.findall(r"'(.+?)'", text)) or text


# -- config files --------------------------------------------------------------------------


def check_files(args: Sequence[str]) -> None:
    """Refuse config files that say nothing, or that say something twice.

    Args:
        args: of the command line; its ``--config`` files are looked at.

    Raises:
        ConfigurationError: names the file, and the line if there is one.
    """
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        name, has_value, given = flag.partition("=")
        if name not in ("--config", "-c"):
            continue
        path = Path(given if has_value else value)
        if not path.is_file():
            continue  # the parser says so, and it also takes a config itself
        try:
            content = _strict(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, _DoubledKeyError) as error:
            raise ConfigurationError(f"--config {path}: {_one_line(error)}") from error
        if not isinstance(content, dict) or not content:
            raise ConfigurationError(
                f"--config {path}: the file holds no settings; it must be a mapping such as "
                "`trainer: {max_steps: 10}`"
            )


def refuse_doubled_keys() -> None:
    """Have the parser refuse them wherever it reads YAML, also in a value or a file of a value."""
    load = get_loader("yaml")

    def strict_load(text: str) -> Any:
        _check_keys(text)
        return load(text)

    if load.__name__ != strict_load.__name__:
        set_loader("yaml", strict_load)


class _DoubledKeyError(ConfigurationError):
    """A mapping has a key twice; YAML's own readers take the last without a word."""


def _strict(text: str) -> Any:
    _check_keys(text)
    return yaml.safe_load(text)


def _check_keys(text: str) -> None:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError):  # whoever loads it says what is wrong
        return
    if node is not None:
        _check_node(node, "")


def _check_node(node: yaml.Node, path: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_node(item, f"{path}[{i}]")
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = f"{path}.{key.value}" if path else str(key.value)
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if name in lines:
                where = f", in lines {lines[name]} and {line}" if line != lines[name] else ""
                raise _DoubledKeyError(f"{name} stands twice{where}; leave one")
            lines[name] = line
        _check_node(value, name)


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
