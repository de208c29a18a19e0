"""YAML keys: the command line's names for settings, which objects name relative to themselves.

An object's error says ``temperature=0.0 must be above 0``, the run's ``task.sampling.temperature``,
and whoever reads it has a config open, where that is ``data.init_args.task.sampling.temperature``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace

from copris_lightning.datamodules.rollout import RolloutDataModule
from copris_lightning.errors import ConfigurationError
from copris_lightning.policy.module import CoprisModule

SHORT = {
    "model": "model.init_args.model",
    "lr": "model.init_args.optimizer.init_args.lr",
    "reward": "data.init_args.task.scoring.reward",
    "temperature": "data.init_args.task.sampling.temperature",
    "max_new_tokens": "data.init_args.task.sampling.max_new_tokens",
    "max_prompt_tokens": "data.init_args.task.max_prompt_tokens",
    "cap": "data.init_args.flow.cap",
    "max_staleness": "data.init_args.flow.max_staleness",
    "batch_groups": "data.init_args.batch.groups",
    "group_size": "data.init_args.batch.group_size",
}
"""Names for the command line of what is changed often, and their keys."""

_ROOTS = (("model", CoprisModule), ("data", RolloutDataModule))
_PART = r"(?:\.[A-Za-z_][\w-]*|\[\d+\])"
_NAME = re.compile(rf"(?<![\w./\\'\"@=-])[A-Za-z_]\w*{_PART}*")


def with_keys(message: str) -> str:
    """A message with the YAML keys of the settings that it names.

    Args:
        message: names settings as :class:`CoprisModule` or :class:`RolloutDataModule` holds them,
            such as ``flow.cap``; a name without a dot only where a value follows, or at its
            beginning.
    """

    def key(found: re.Match[str]) -> str:
        name = found[0]
        behind = message[found.end() : found.end() + 1]
        is_told = behind == "=" or (behind == ":" and found.start() == 0)
        has_parts = "." in name or "[" in name
        return (yaml_key(name) if has_parts or is_told else None) or name

    return _NAME.sub(key, message)


def yaml_key(name: str) -> str | None:
    """The YAML key of a setting; ``None`` if there is no such setting.

    Args:
        name: from the module or data module on, such as ``task.sampling.temperature``.
    """
    first, *parts = re.findall(r"\w[\w-]*|\[\d+\]", name)
    for root, owner in _ROOTS:
        kind = _settings(owner).get(first)
        if kind is not None:
            rest = _path(kind, parts)
            return None if rest is None else f"{root}.init_args.{first}{rest}"
    return None


def _path(kind: Any, parts: list[str]) -> str | None:
    """How a setting's own settings are reached in YAML, from behind its name on."""
    if not parts:
        return ""
    part, *rest = parts
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for member in members:
        origin, arguments = get_origin(member), get_args(member)
        inner, joint = None, f".{part}"
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            inner = _settings(member).get(part)
        elif isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
            inner = arguments[1]
        elif part.startswith("[") and arguments:
            inner, joint = arguments[0], part
        if inner is not None:
            found = _path(inner, rest)
            return None if found is None else joint + found
    if not any(map(_has_class_path, members)):
        return None
    return ".init_args" + "".join(p if p.startswith("[") else f".{p}" for p in parts)


def _has_class_path(kind: Any) -> bool:
    """Whether values are written as ``class_path`` and ``init_args``."""
    if kind in (None, type(None), str, int, float, bool, dict, list):
        return False
    return not (get_origin(kind) in (Literal, dict, list) or dataclasses.is_dataclass(kind))


@cache
def _settings(owner: Any) -> dict[str, Any]:
    """Names and types of what a class is made with."""
    hints = get_type_hints(owner.__init__)
    names = list(inspect.signature(owner.__init__).parameters)[1:]
    return {name: hints[name] for name in names if name in hints}


# -- short names ---------------------------------------------------------------------------


def without_short_names(args: Sequence[str]) -> list[str]:
    """A command line with the keys that its short names stand for.

    Raises:
        ConfigurationError: a setting is given twice, by its short and its long name.
    """
    long: list[str] = []
    given: dict[str, str] = {}
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, has_value, inline = option.partition("=")
        key = SHORT.get(name.removeprefix("--")) if name.startswith("--") else None
        if name == "--model" and _is_class(inline if has_value else value):
            key = None
        short = (key or name.removeprefix("--")).replace(".init_args", "")
        if name.startswith("--") and short in given and name != given[short]:
            raise ConfigurationError(f"{given[short]} and {name} set the same; leave one")
        if key is not None or short in {k.replace(".init_args", "") for k in SHORT.values()}:
            given[short] = name
        long.append(option if key is None else f"--{key}{has_value}{inline}")
    return long


def _is_class(value: str) -> bool:
    """Whether ``--model`` is given Lightning's way: a class or a config of one."""
    return bool(re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value)) or value[:1] == "{"


# -- objects that could not be made --------------------------------------------------------


class Refused:
    """Stands for an object that refused its settings, until its whole name is known.

    The parser makes objects from the inside out, and none of them knows what it is held by.
    """

    def __init__(self, error: ConfigurationError) -> None:
        self.error = error

    def under(self, name: str) -> Refused:
        """The same, for what would have held the object."""
        self.error.under(name)
        return self


class Maker:
    """Makes objects for the parser; :class:`Refused` stands in for one that refuses.

    Args:
        make: called with the class and its arguments, and with what the parser says about links.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(
        self, cls: Any, /, *args: Any, applied_instantiation_links: dict[str, Any], **settings: Any
    ) -> Any:
        """An object of the class, or what stands for it."""
        links = applied_instantiation_links
        make = partial(self._make, cls, *args, applied_instantiation_links=links, **settings)
        return _made(make, settings)


def make(cls: Any, /, *args: Any, **settings: Any) -> Any:
    """As :class:`Maker`, where nobody asks about links."""
    return _made(partial(cls, *args, **settings), settings)


def _made(make: Callable[[], Any], settings: dict[str, Any]) -> Any:
    for name, refused in refusals(settings):
        return refused.under(name)
    try:
        return make()
    except ConfigurationError as error:
        return Refused(error)


def refusals(value: Any, name: str = "") -> Iterator[tuple[str, Refused]]:
    """What could not be made in a tree of settings, with the names that lead there."""
    if isinstance(value, Refused):
        yield name, value
    elif isinstance(value, Namespace | dict):
        items = vars(value).items() if isinstance(value, Namespace) else value.items()
        for key, inner in items:
            yield from refusals(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from refusals(inner, f"{name}[{i}]")
