"""What is wrong with a config, in one line: key, value, and what it must be."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from copris_lightning.errors import ConfigurationError
from copris_lightning.keys import Maker, make

_EXPECTED = re.compile(
    r"Expected an? (<class '[^']+'>|typing\.Literal\[.+?\])"
    r"(?:\. Got value: (.*?)(?:\. Got value: .*)?)?",
    re.S,
)
_CALLABLE = re.compile(
    r"Type .+ expects a function or a callable class: (.*?)(?:\. Got value: .*)?", re.S
)
_CLASS_PATH = re.compile(
    r"argument of type '(?!NoneType)\w+' is not iterable"
    r"|Expected a dot import path string:(?! None$) ?(.*)"
)
_NOT_A_CLASS = (
    r"Not a valid subclass of |argument of type 'NoneType'|Expected a path but None "
    r"|Expected a dot import path string: None$"
)
_NO_PATH = re.compile(
    r"Expected a dot import path string: |Unexpected import path format: |Not a valid subclass of "
)
_NO_CLASS = "it must be a class_path, with init_args or without, and no other keys"
_NO_SETTING = "there is no such setting"
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

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Read a value that another parser handed on, which it writes as Python does."""
        if args is not None and not self.exit_on_error:
            args = [_reread(arg) for arg in args]
        return super().parse_args(args, *rest, **options)

    def add_instantiator(
        self, instantiator: Any, class_type: Any, subclasses: bool = True, prepend: bool = False
    ) -> None:
        """Have objects made that may refuse their settings; see :class:`Maker`."""
        super().add_instantiator(Maker(instantiator), class_type, subclasses, prepend)

    def name_refusals(self) -> None:
        """The same for the objects that nobody has an instantiator for. Comes last."""
        super().add_instantiator(make, object)

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """Look at nulls as well, which to the parser say that nothing was given.

        Raises:
            TypeError: in the parser's own words.
        """
        super().validate(namespace, *args, **kwargs)
        for name in self.groups or ():
            if name in namespace and namespace[name] is None:
                raise TypeError(f'Parser key "{name}":\n  Expected a {dict}. Got value: null')
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            is_given = action.dest in namespace and namespace[action.dest] is None
            if kind is None or action.default is None or not is_given or _takes_null(kind):
                continue
            plain = [k for k in _members(kind) if isinstance(k, type) or get_origin(k) is Literal]
            lines = [f"Expected a {k}. Got value: null" for k in plain]
            lines = lines or ["null is no value; leave the key out for its default"]
            raise TypeError("\n  ".join([f'Parser key "{action.dest}":', *lines]))


def _reread(arg: str) -> str:
    """An option whose value is a mapping of Python's, with the same one of JSON's."""
    option, equals, value = arg.partition("=")
    try:
        return f"{option}{equals}{json.dumps(ast.literal_eval(value))}" if value[:1] == "{" else arg
    except (ValueError, SyntaxError, TypeError):  # it is YAML already
        return arg


def configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """The error itself, or the one it wraps: the parser wraps what a class raises."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _takes_null(kind: Any) -> bool:
    return any(
        member in (None, type(None), Any)
        or (get_origin(member) is Literal and None in get_args(member))
        for member in _members(kind)
    )


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
        said = [text for text in texts if text != _NO_CLASS]
        if not said and any(m[1] != "<class 'NoneType'>" for m in expected):
            kinds = " or ".join(dict.fromkeys(_kind(m[1]) for m in expected))
            return f"{key} must be {kinds} or a class_path with init_args"
        texts = said or texts
        return f"{key}: {'; '.join(texts)}" if key else "; ".join(texts)
    value = next((m[2] for m in expected if m[2] is not None), None) or _given_value(message)
    kinds = " or ".join(dict.fromkeys(_kind(m[1]) for m in expected))
    return f"{key}={'null' if value == 'None' else value} must be {kinds}"


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
    exact = next((line.text for line in lines if line.text.startswith("Subtypes: ")), exact)
    fields = _fields(exact)
    for line in lines:
        if fields and line.text.startswith("Expected a path but "):
            continue
        if fields and _NO_PATH.match(line.text):
            yield key, f"Expected a <class 'a mapping of {fields}'>"
        elif match := re.match(r'Parser key "(.+?)":(.*)', line.text):
            inner = f"{prefix}.{match[1]}" if prefix else match[1]
            if line.below:
                yield from _leaves(line.below, inner)
            else:
                yield inner, match[2].strip()
        elif match := re.match(r"Problem with given class_path '(.+?)':", line.text):
            is_value = _is_value(match[1], exact)
            yield from _leaves(line.below, key, within="" if is_value else f"{key}.init_args")
        elif match := re.match(r"Option '(.+?)' is not accepted", line.text):
            yield f"{prefix}.{match[1]}", _NO_SETTING
        elif match := re.match(r"Subcommand '.+?' does not accept option '(.+?)'", line.text):
            yield match[1], _NO_SETTING
        elif match := re.match(r"Group '(.+?)' does not accept option '(.+?)'", line.text):
            group = f"{prefix}.{match[1]}" if prefix else match[1]
            yield f"{group}.{match[2]}", _NO_SETTING
        elif match := _CALLABLE.fullmatch(line.text):
            yield from _leaves([_Line(match[1], line.below)], key, within=f"{key}.init_args")
        elif match := _CLASS_PATH.fullmatch(line.text):
            given = f"={match[1]}" if match[1] else ""
            yield f"{key}.class_path{given}", "it must be the path of a class: module.Class"
        elif re.match(_NOT_A_CLASS, line.text):
            yield key, _NO_CLASS
        elif line.text == "Errors:":
            yield from _leaves(line.below, key, exact=exact)
        elif not re.match("Does not validate|Subtypes:|Given value", line.text):
            yield key, line.text
            yield from _leaves(line.below, key)


def _fields(exact: str) -> str:
    """The fields of a union's one dataclass, if its other types are no classes that YAML names."""
    found = [path.rpartition(".") for path in re.findall(r"<class '([\w.]+\.\w+)'>", exact)]
    classes = [getattr(import_module(module), name, None) for module, _, name in found]
    if len(classes) != 1 or not dataclasses.is_dataclass(classes[0]):
        return ""
    return " and ".join(field.name for field in dataclasses.fields(classes[0]))


def _is_value(path: str, exact: str) -> bool:
    """Whether a class is written in YAML without ``init_args``: a dataclass, by its own name."""
    module, _, name = path.rpartition(".")
    if f".{name}'>" not in exact:
        return False
    found = getattr(import_module(module), name, None)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        return False
    return f"<class '{found.__module__}.{found.__qualname__}'>" in exact


def _given_value(message: str) -> str:
    values: list[str] = re.findall(r"Given value: (.*)", message)
    nested = re.fullmatch(r"NestedArg\(key='.+?', val='(.*)'\)", values[0]) if values else None
    return nested[1] if nested else values[0] if values else ""


def _kind(text: str) -> str:
    if match := re.fullmatch(r"<class '(?:.+\.)?(\w+)'>", text):
        return _NAMES.get(match[1], match[1])
    return " or ".join(re.findall(r"'(.+?)'", text)) or text
