"""A pipeline file as a tree of values with their places, and the report of all mistakes in it.

YAML is read by the core schema of YAML 1.2: ``1e-4`` is a number, ``no`` and ``2024-01-31`` are text. Keys are text and
unique, numbers are finite. Anchors, aliases and merge keys (``<<: *name``) work.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.base import nearest
from rlhf.errors import SettingsError

SHOWN = 5
"""Problems that one error names."""


@dataclass(frozen=True)
class Problem:
    """A mistake: what is wrong, where it was written, and what to write instead ("" where the rest says it)."""

    what: str
    where: str
    hint: str = ""


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise a SettingsError that shows the first five problems; do nothing without any."""
    if not problems:
        return
    if len(problems) == 1:
        raise SettingsError(problems[0].what, problems[0].where, problems[0].hint)
    lines = [f"{len(problems)} settings are wrong"]
    for problem in problems[:SHOWN]:
        hint = f" ({problem.hint})" if problem.hint else ""
        lines.append(f"  {problem.where}: {problem.what}{hint}")
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    raise SettingsError("\n".join(lines))


CONFIGS = Path("configs")
"""Where a checkout keeps its pipelines."""

KeyPath = tuple[str | int, ...]
# Where a node was written, in words.
Place = Callable[[yaml.Node], str]

# A few lines of aliases to aliases can mean more values than any memory holds.
_MOST_NODES = 100_000
_TAG = "tag:yaml.org,2002:"
# Tag, text that means it, and the signs such text starts with. Integers come before floats: the first match counts.
_RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


def _value_of(node: yaml.ScalarNode) -> Any:
    """Raises ValueError for text that its tag does not allow."""
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "bool":
            return text.lower() == "true"
        # Python writes no number of more than 4,300 digits, and no setting needs more than 20.
        case "int" if len(text) <= 100:
            return int(text, 0)
        case "float" if math.isfinite(value := float(text)):
            return value
        case "float":
            raise OverflowError
        case "null":
            return None
        case "str":
            return text
        case _:
            raise ValueError


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute, filled below


class _CoreDumper(yaml.SafeDumper):
    # A dumper quotes the text that a loader with the same resolvers would take for something else.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute, filled below

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


for _resolved_by in (_CoreLoader, _CoreDumper):
    for _name, _pattern, _first in _RESOLVERS:
        _resolved_by.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def to_yaml(values: Mapping[str, Any], *, ascii_only: bool = False) -> str:
    """Write JSON values as YAML that :func:`read_tree` reads back to the same values."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": not ascii_only, "default_flow_style": False}
    return yaml.dump(dict(values), Dumper=_CoreDumper, **options)


def scalar(text: str) -> str:
    """Write a text as one line of YAML that means it wherever a value may stand, in quotes where it needs them."""
    # Only double quotes keep the line breaks within a text.
    quotes = None if [text] == text.splitlines() else '"'
    options: dict[str, Any] = {"allow_unicode": True, "width": math.inf, "default_flow_style": True}
    return yaml.dump([text], Dumper=_CoreDumper, default_style=quotes, **options)[1:-2]


def dotted(path: KeyPath) -> str:
    """Write a key path as an override names it: ``ppo.kl.coef``."""
    return ".".join(map(str, path))


@dataclass
class Tree:
    """Raw settings, the place where each was written, and what is wrong with the writing."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    """What is right today and should be written otherwise from now on, a line each."""
    _places: dict[KeyPath, str] = field(default_factory=dict, init=False)
    _nodes: int = field(default=0, init=False)

    def place(self, path: KeyPath) -> str:
        """Return where a setting, or the nearest section around it, was written: ``file:line`` or the override."""
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, str(self.file))

    def override(self, text: str) -> None:
        """Apply ``section.field=value``, the value in YAML; mistakes go to ``problems``."""
        where = f"override {text}"
        name, equals, written = text.partition("=")
        path = tuple(name.strip().split("."))
        if not equals or not all(path):
            self.problems.append(Problem(f"{text!r} is not an override", where, "write section.field=value"))
            return
        try:
            node = yaml.compose(written, _CoreLoader)
        except RecursionError:
            raise _too_deep(f"override {name}") from None
        except yaml.YAMLError as error:
            self.problems.append(Problem(f"{written!r} is not valid YAML: {_reason(error)}", where, "quote the value"))
            return
        section = self.values
        for depth, key in enumerate(path[:-1], start=1):
            if section.get(key) is None:
                section[key] = {}
                self._places.setdefault(path[:depth], where)
            if not isinstance(section[key], dict):
                what = f"{dotted(path[:depth])} is a single value; it holds no {dotted(path[depth:])}"
                self.problems.append(Problem(what, where, f"it was set at {self.place(path[:depth])}"))
                return
            section = section[key]
        self._places = {old: place for old, place in self._places.items() if old[: len(path)] != path}
        self._places[path] = where
        section[path[-1]] = self.read(node, path, lambda _: where)

    def rename(self, path: KeyPath, name: str) -> None:
        """Give the setting at ``path``, in a section, another name; it keeps the places where it was written."""
        section: Any = self.values
        for key in path[:-1]:
            section = section[key]
        section[name] = section.pop(path[-1])
        new = (*path[:-1], name)
        self._places = {
            new + old[len(path) :] if old[: len(path)] == path else old: place for old, place in self._places.items()
        }

    def read(self, node: yaml.Node | None, path: KeyPath, place: Place, around: tuple[yaml.Node, ...] = ()) -> Any:
        """Return a node's plain values; ``around`` are the nodes around it, to notice a node that contains itself."""
        if node is None:
            return None
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            what = f"there are more than {_MOST_NODES} settings, with what aliases repeat"
            raise SettingsError(what, place(node), "remove aliases that repeat aliases")
        if node in around:
            self.problems.append(Problem(f"{dotted(path)} contains itself", place(node)))
            return None
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key, value in self._pairs(node, path, place, around):
                self._places[(*path, key.value)] = place(key)
                values[key.value] = self.read(value, (*path, key.value), place, (*around, node))
            return values
        if isinstance(node, yaml.SequenceNode):
            items: list[Any] = []
            for index, item in enumerate(node.value):
                self._places[(*path, index)] = place(item)
                items.append(self.read(item, (*path, index), place, (*around, node)))
            return items
        assert isinstance(node, yaml.ScalarNode)
        try:
            return _value_of(node)
        except ValueError:
            tag = node.tag.replace(_TAG, "!!")
            self.problems.append(Problem(f"{dotted(path)} is {node.value!r} and cannot be read as {tag}", place(node)))
        except OverflowError:
            self.problems.append(Problem(f"{dotted(path)} is {node.value}, which is too large a number", place(node)))
        return None

    def _pairs(
        self, node: yaml.MappingNode, path: KeyPath, place: Place, around: tuple[yaml.Node, ...]
    ) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        """Return the keys and values of a mapping; those that it merges come first, so that its own win."""
        merged: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):
                    if isinstance(source, yaml.MappingNode) and source not in (*around, node):
                        merged += self._pairs(source, path, place, (*around, node))
                    else:
                        self.problems.append(Problem("<< takes another section, or a list of them", place(key)))
            elif not isinstance(key, yaml.ScalarNode) or key.tag != f"{_TAG}str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or section"
                what = f"a setting's name is text, and this one is {shown}"
                self.problems.append(Problem(what, place(key), "put it in quotes"))
            elif key.value in own:
                what = f"{dotted((*path, key.value))} is set twice"
                hint = f"delete one of the two; the first is at {place(own[key.value][0])}"
                self.problems.append(Problem(what, place(key), hint))
            else:
                own[key.value] = (key, value)
        return [*merged, *own.values()]


def read_tree(file: Path) -> Tree:
    """Read a pipeline file. Raises SettingsError for a file that is missing, unreadable or not YAML.

    Mistakes inside valid YAML, such as a repeated key, go to the tree's ``problems``, to be reported together.
    """
    tree = Tree(file)
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), _CoreLoader)
        if not isinstance(node, yaml.MappingNode):
            holds = "is empty" if node is None else "holds no settings"
            raise SettingsError(f"{file} {holds}", str(file), "a pipeline file holds sections of `name: value` lines")
        tree.values = tree.read(node, (), lambda node: f"{file}:{node.start_mark.line + 1}")
    except FileNotFoundError:
        raise _missing(file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file} cannot be read as text: {error}", str(file)) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
        raise SettingsError(f"{file} is not valid YAML: {_reason(error)}", where, "correct that line") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file} is not valid YAML: {error}", str(file)) from error
    except RecursionError:
        raise _too_deep(str(file)) from None
    return tree


def _too_deep(where: str) -> SettingsError:
    return SettingsError("settings are nested too deeply", where, "write them flatter")


def _reason(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    return ", ".join(part for part in (error.problem, error.context) if part)


def _missing(file: Path) -> SettingsError:
    beside = sorted(str(other) for other in file.parent.glob("*.yaml"))
    # Without its folder, a name means a pipeline of the checkout that is the working folder.
    usual = sorted(str(other) for other in CONFIGS.glob("*.yaml"))
    close = nearest(str(file), beside)
    if close is None and (name := nearest(file.name, [Path(other).name for other in usual])):
        close = str(CONFIGS / name)
    others = beside or usual
    folders = " or ".join(dict.fromkeys((str(file.parent), str(CONFIGS))))
    next_step = f"no pipeline file lies in {folders}; name one with --config"
    if close:
        next_step = f"--config {close}" + (f" (beside it: {', '.join(others)})" if len(others) > 1 else "")
    elif others:
        next_step = f"--config with one of {', '.join(others)}"
    return SettingsError(f"there is no pipeline file {file}", str(file), next_step)
