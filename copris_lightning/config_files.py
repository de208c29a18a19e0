"""Config files: what they may not say, and what several of them say together.

Evaluations add up by name. The parser merges what two files say about one of them, but of a mapping
it keeps the names of the last file only: an overlay that adds one would silently drop the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from copris_lightning.errors import ConfigurationError

_DECIDED = {
    "data.init_args.seed": "seed_everything",
    "data.init_args.model": "model.init_args.model",
}
"""Settings that the command line takes from others, whatever they are set to."""


def check_files(args: Sequence[str]) -> None:
    """Refuse config files that say nothing, that say something twice, or that set what another
    setting decides.

    Args:
        args: of the command line; its ``--config`` files are looked at.

    Raises:
        ConfigurationError: names the file, and the line if there is one.
    """
    for flag, value in zip(args, [*args[1:], ""], strict=True):
        name, has_value, given = flag.partition("=")
        for target, source in _DECIDED.items():
            if name in (f"--{target}", f"--{target.replace('.init_args', '')}"):
                raise ConfigurationError(f"{name} has no effect: --{source} decides it; set that")
        if name not in ("--config", "-c"):
            continue
        path = Path(given if has_value else value)
        if not path.is_file():
            continue  # the parser says so, and it also takes a config itself
        try:
            content = _strict(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, ConfigurationError) as error:
            raise ConfigurationError(f"--config {path}: {_one_line(error)}") from error
        if not isinstance(content, dict) or not content:
            raise ConfigurationError(
                f"--config {path}: the file holds no settings; it must be a mapping such as "
                "`trainer: {max_steps: 10}`"
            )
        for target, source in _DECIDED.items():
            chosen = _entry(content, target)
            if chosen is not None and chosen != _entry(content, source):
                raise ConfigurationError(
                    f"--config {path}: {target}={chosen} has no effect: {source} decides it; set "
                    "that"
                )


def _entry(content: Any, key: str) -> Any:
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


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
        _check_node(node, "", ())


def _check_node(node: yaml.Node, path: str, around: tuple[yaml.Node, ...]) -> None:
    if any(node is other for other in around):
        line = node.start_mark.line + 1
        raise ConfigurationError(f"line {line}: {path} is an alias of what it stands in")
    around = (*around, node)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _check_node(item, f"{path}[{i}]", around)
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
        _check_node(value, name, around)


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


# -- evaluations ---------------------------------------------------------------------------


def with_all_evaluations(args: Sequence[str]) -> list[str]:
    """A command line whose later config files also name the evaluations of the earlier ones.

    Args:
        args: of the command line; its config files have been checked.
    """
    found: list[str] = []
    names: dict[str, None] = {}
    is_config = False
    for arg in args:
        option, _, inline = arg.partition("=")
        value = arg if is_config else inline if option in ("--config", "-c") else ""
        is_config = arg in ("--config", "-c")
        whole = _completed(value, names) if value else None
        found.append(arg if whole is None else f"{arg.removesuffix(value)}{whole}")
    return found


def _completed(path: str, names: dict[str, None]) -> str | None:
    """What to read in the place of a file that does not name all evaluations so far."""
    if not Path(path).is_file():
        return None
    content = yaml.safe_load(Path(path).read_text("utf-8"))
    evaluations = _evaluations(content)
    lacking = [name for name in names if name not in evaluations]
    names |= dict.fromkeys(evaluations)
    if not evaluations or not lacking:
        return None
    evaluations.update({name: {} for name in lacking})
    return json.dumps(content)


def _evaluations(content: Any) -> dict[str, Any]:
    """Of a config, to be changed; none where there are none."""
    for key in ("data", "init_args", "evaluations"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}
