"""Compare two results, or a result with a planned one: find the settings, files and versions behind a change.

A changed input is followed to the stage that made it, and there to *its* changed settings, files and inputs. A
:class:`Recipe` is either side of the comparison.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from rlhf.store import ActionRecord, Store

Kind = Literal["version", "setting", "content", "input", "origin"]
_SOURCES = "sources."
_METHOD = "method"
"""The setting of a section that decides which other settings the section has (rlhf/config/tuning.py)."""


ABSENT: Final = object()
"""The value of a setting that one side does not have, unlike a setting that is null."""


@dataclass(frozen=True)
class Recipe:
    """The stage, settings and inputs of an existing or planned result."""

    name: str
    """The instance's name if known, else the stage's."""
    stage: str
    version: int
    settings: Mapping[str, Any]
    """The semantic settings, nested."""
    inputs: Mapping[str, str | None]
    """Role to the digest of the input; None if it has not been made yet."""
    artifact: str | None
    """The result; None before it exists."""
    maker: Callable[[str], "Recipe | None"]
    """Role to the recipe of the input; None if that is unknown."""


@dataclass(frozen=True)
class Difference:
    """A single difference.

    name    dotted setting, setting of a file, role of an input, "stage" for a version, or instance for an origin
    within  of an input: the differences of its recipes
    maker   of an input: the instance that makes it now; "" if unknown
    """

    kind: Kind
    name: str
    old: Any
    new: Any
    within: tuple["Difference", ...] = ()
    maker: str = ""

    @property
    def phrase(self) -> str:
        """A few words: old value → new value."""
        change = f"{shown(self.old)} → {shown(self.new)}"
        match self.kind:
            case "input" if self.old is ABSENT or self.new is ABSENT:
                return f"input {self.name} {'added' if self.old is ABSENT else 'removed'}"
            case "input":
                return f"input {self.name} {'changed' if self.new else 'will change'}"
            case "content":
                return f"content of {self.name} {change}"
            case "version":
                return f"stage {change}"
            case "origin":
                return change
            case "setting":
                return f"{self.name} {change}"

    def leaves(self, stage: str) -> list[str]:
        """Return the differences that cause this one, each after the name of its stage, none twice."""
        if not self.within:
            return [f"{stage}.{self.phrase}" if self.kind == "setting" else f"{stage}: {self.phrase}"]
        return list(dict.fromkeys(leaf for inner in self.within for leaf in inner.leaves(self.maker)))

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value without the side that is absent."""
        values: dict[str, Any] = {"what": self.phrase, "kind": self.kind, "name": self.name}
        values |= {name: side for name, side in (("old", self.old), ("new", self.new)) if side is not ABSENT}
        if self.kind == "input":
            values |= {"stage": self.maker, "differences": [inner.to_json() for inner in self.within]}
        return values


def of_record(record: ActionRecord, store: Store, name: str | None = None) -> Recipe:
    """Return the recipe of a committed result."""

    def maker(role: str) -> Recipe | None:
        key = record.inputs.get(role, {}).get("key")
        made = store.action(key) if key else None
        return of_record(made, store) if made else None

    digests = {role: entry["digest"] for role, entry in record.inputs.items()}
    return Recipe(name or record.stage, record.stage, record.version, record.settings, digests, record.artifact, maker)


def differences(old: Recipe, new: Recipe) -> list[Difference]:
    """Return the differences of two recipes: the stage first, then settings, files and inputs by name."""
    if "import" in (old.stage, new.stage):
        was, now = (
            f"{'imported' if side.stage == 'import' else 'made by its stage'} "
            f"({side.artifact[:8] + '…' if side.artifact else 'not made yet'})"
            for side in (old, new)
        )
        return [] if old.artifact == new.artifact else [Difference("origin", new.name, was, now)]
    changed = changed_settings((old.stage, old.version, old.settings), (new.stage, new.version, new.settings))
    for role in sorted(old.inputs.keys() | new.inputs.keys()):
        was, now = (side.inputs.get(role, ABSENT) for side in (old, new))
        if was == now:
            continue
        if was is ABSENT or now is ABSENT:
            changed.append(Difference("input", role, was, now))
            continue
        before, after = old.maker(role), new.maker(role)
        within = tuple(differences(before, after)) if before and after else ()
        # An input that is still to be made, from an unchanged recipe, may come out as before.
        if now is not None or within:
            changed.append(Difference("input", role, was, now, within, after.name if after else ""))
    return changed


def changed_settings(
    old: tuple[str, int, Mapping[str, Any]], new: tuple[str, int, Mapping[str, Any]]
) -> list[Difference]:
    """Return the differences in stage, version and settings, and in the contents of files that settings name.

    A section of another method is one difference: most of its settings have no counterpart.

    old, new  a stage's name and version, and the semantic settings
    """
    changed: list[Difference] = []
    if old[:2] != new[:2]:
        was_of, now_of = (f"{stage} version {version}" for stage, version, _ in (old, new))
        changed.append(Difference("version", "stage", was_of, now_of))
    was, now = flatten(old[2]), flatten(new[2])
    methods = [name for name in was.keys() | now.keys() if name.endswith(f".{_METHOD}")]
    for section in (name.removesuffix(f".{_METHOD}") for name in methods if was.get(name) != now.get(name)):
        was, now = _with_section_whole(was, section), _with_section_whole(now, section)
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name, ABSENT), now.get(name, ABSENT)
        # As JSON, like keys: 1, 1.0 and true are three values in JSON, but equal in Python.
        if before is ABSENT or after is ABSENT or json.dumps(before) != json.dumps(after):
            kind = "content" if name.startswith(_SOURCES) else "setting"
            changed.append(Difference(kind, name.removeprefix(_SOURCES), before, after))
    return changed


def _with_section_whole(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return flattened settings in which ``section`` is one value that begins with its method, if it is there."""
    inside = f"{section}."
    inner = {name.removeprefix(inside): value for name, value in settings.items() if name.startswith(inside)}
    method_first = dict(sorted(inner.items(), key=lambda item: item[0] != _METHOD))
    outside = {name: value for name, value in settings.items() if not name.startswith(inside)}
    return outside | ({section: method_first} if inner else {})


def shown(value: Any) -> str:
    """Return a setting's value for people: text in a line, digests and long texts cut, others as in a pipeline file."""
    if isinstance(value, Mapping):
        section = ", ".join(f"{name}: {shown(inner)}" for name, inner in value.items())
        return f"{{{section}}}" if len(section) <= 60 else f"{{{section[:59]}…}}"
    if isinstance(value, str):
        if len(value) == 64 and value.isalnum():
            return f"{value[:8]}…"
        line = " ".join(value.split())
        return line if len(line) <= 60 else f"{line[:59]}…"  # a judge's instructions would fill the screen
    return "absent" if value is ABSENT else json.dumps(value, ensure_ascii=False)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping with names such as ``rewards[0].weight``; plain lists stay whole."""
    if isinstance(value, Mapping) and (value or not name):
        parts = {f"{name}.{key}" if name else key: inner for key, inner in value.items()}
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        parts = {f"{name}[{number}]": inner for number, inner in enumerate(value)}
    else:
        return {name: value}
    return {key: leaf for part, inner in parts.items() for key, leaf in flatten(inner, part).items()}
