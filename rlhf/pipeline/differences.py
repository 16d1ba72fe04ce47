"""What differs between two results, or between a result and what a plan asks for: down to the settings that began it.

An input that changed is followed to the stage that made it, and there to *its* changed settings, files and inputs. A
:class:`Recipe` is either side of the comparison.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.store import ActionRecord, Store

Kind = Literal["version", "setting", "content", "input", "origin"]
_SOURCES = "sources."


class _Absent:
    """A setting that one side does not have, which is another thing than one that is null."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclass(frozen=True)
class Recipe:
    """What a result was or would be made from."""

    name: str
    """The instance's name where it is known, else the stage's."""
    stage: str
    version: int
    settings: Mapping[str, Any]
    """The semantic ones, nested."""
    inputs: Mapping[str, str | None]
    """Role to the digest of what was read; None for what has not been made yet."""
    artifact: str | None
    """The result; None before there is one."""
    maker: Callable[[str], "Recipe | None"]
    """Of a role: what made it; None where nothing is known of that."""

    @property
    def imported(self) -> bool:
        """Whether somebody brought the result from outside."""
        return self.stage == "import"


@dataclass(frozen=True)
class Difference:
    """One thing that differs.

    name    dotted setting, file's setting, role of an input, or what else the kind says
    within  of an input: what differs in the making of it
    maker   of an input: the instance that makes it now; "" where that is unknown
    """

    kind: Kind
    name: str
    old: Any
    new: Any
    within: tuple["Difference", ...] = ()
    maker: str = ""

    @property
    def phrase(self) -> str:
        """The difference in a few words, old value → new value."""
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
        """The differences that this one comes from, each after the name of its stage, none twice."""
        if not self.within:
            return [f"{stage}.{self.phrase}" if self.kind == "setting" else f"{stage}: {self.phrase}"]
        return list(dict.fromkeys(leaf for inner in self.within for leaf in inner.leaves(self.maker)))

    def to_json(self) -> dict[str, Any]:
        """The difference as a JSON value; a side that is absent is left out."""
        sides = {name: side for name, side in (("old", self.old), ("new", self.new)) if side is not ABSENT}
        inside = {"stage": self.maker, "differences": [inner.to_json() for inner in self.within]}
        return (
            {"what": self.phrase, "kind": self.kind, "name": self.name}
            | sides
            | (inside if self.kind == "input" else {})
        )


def of_record(record: ActionRecord, store: Store, name: str | None = None) -> Recipe:
    """The recipe of a committed result."""

    def maker(role: str) -> Recipe | None:
        key = record.inputs.get(role, {}).get("key")
        made = store.action(key) if key else None
        return of_record(made, store) if made else None

    digests = {role: entry["digest"] for role, entry in record.inputs.items()}
    return Recipe(name or record.stage, record.stage, record.version, record.settings, digests, record.artifact, maker)


def differences(old: Recipe, new: Recipe) -> list[Difference]:
    """What differs in the making of two results, the stage first, then settings, files and inputs by name."""
    if old.imported or new.imported:
        return [] if old.artifact == new.artifact else [_origin(old, new)]
    found = changed_settings(
        (old.stage, old.version, old.settings),
        (new.stage, new.version, new.settings),
    )
    for role in sorted(old.inputs.keys() | new.inputs.keys()):
        was, now = (side.inputs.get(role, ABSENT) for side in (old, new))
        if was == now:
            continue
        if was is ABSENT or now is ABSENT:
            found.append(Difference("input", role, was, now))
            continue
        before, after = old.maker(role), new.maker(role)
        within = tuple(differences(before, after)) if before and after else ()
        # Nothing changed in the making of what is still to be made: it may come out as it was.
        if now is not None or within:
            found.append(Difference("input", role, was, now, within, after.name if after else ""))
    return found


def _origin(old: Recipe, new: Recipe) -> Difference:
    def told(side: Recipe) -> str:
        artifact = side.artifact[:8] + "…" if side.artifact else "not made yet"
        return f"{'imported' if side.imported else 'made by its stage'} ({artifact})"

    return Difference("origin", new.name, told(old), told(new))


def changed_settings(
    old: tuple[str, int, Mapping[str, Any]], new: tuple[str, int, Mapping[str, Any]]
) -> list[Difference]:
    """What differs in stage, version and settings, and in the contents of files that settings name.

    old, new  a stage's name and version, and the semantic settings
    """
    found: list[Difference] = []
    if old[:2] != new[:2]:
        was_of, now_of = (f"{stage} version {version}" for stage, version, _ in (old, new))
        found.append(Difference("version", "stage", was_of, now_of))
    was, now = flatten(old[2]), flatten(new[2])
    for name in sorted(was.keys() | now.keys()):
        before, after = was.get(name, ABSENT), now.get(name, ABSENT)
        # As JSON, since that is what keys are made of: 1, 1.0 and true are three values there, and equal to Python.
        if before is ABSENT or after is ABSENT or json.dumps(before) != json.dumps(after):
            kind = "content" if name.startswith(_SOURCES) else "setting"
            found.append(Difference(kind, name.removeprefix(_SOURCES), before, after))
    return found


LONGEST_SHOWN = 60
"""Characters of a text that is a setting: a judge's instructions would fill the screen."""


def shown(value: Any) -> str:
    """A setting's value for people: text in one line, digests and long texts short, all else as in a pipeline file."""
    if isinstance(value, str):
        if len(value) == 64 and value.isalnum():
            return f"{value[:8]}…"
        line = " ".join(value.split())
        return line if len(line) <= LONGEST_SHOWN else f"{line[: LONGEST_SHOWN - 1]}…"
    return repr(value) if value is ABSENT else json.dumps(value, ensure_ascii=False)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings as one mapping of names: ``rewards[0].weight``. Lists of plain values stay whole."""
    if isinstance(value, Mapping) and (value or not name):
        parts = {f"{name}.{key}" if name else key: inner for key, inner in value.items()}
    elif isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        parts = {f"{name}[{number}]": inner for number, inner in enumerate(value)}
    else:
        return {name: value}
    return {key: leaf for part, inner in parts.items() for key, leaf in flatten(inner, part).items()}
