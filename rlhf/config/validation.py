"""From raw values to a settings model, and from what pydantic says to what a reader can act on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.config.base import Settings
from rlhf.config.fields import describe, in_words, names_at, schema_at
from rlhf.config.nearest import suggestion
from rlhf.config.problems import Problem
from rlhf.config.yaml_tree import KeyPath, Tree, dotted

AnySettings = TypeVar("AnySettings", bound=Settings)

# Longer values are cut in messages.
SHOWN_CHARACTERS = 60


def validated(
    model: type[AnySettings], values: Mapping[str, Any], tree: Tree, at: KeyPath, also_known: Sequence[str] = ()
) -> AnySettings | None:
    """Return ``values`` as settings, or None after adding what is wrong with them to ``tree.problems``.

    No value is converted to the type asked for: text is no number and a number no truth value.

    at          where in the tree the values lie
    also_known  names that may stand beside the model's own, to be suggested for an unknown one
    """
    try:
        # By way of JSON: strict about numbers, yet a list may fill a tuple and text a path.
        return model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        seen: set[KeyPath] = set()
        for detail in error.errors(include_url=False):
            path = _path_in(values, detail)
            # A union complains once for each of its options.
            if path not in seen:
                seen.add(path)
                tree.problems.append(_problem(model, tree, at, path, detail, also_known))
        return None


def _path_in(values: Any, detail: ErrorDetails) -> KeyPath:
    """Return pydantic's location without the names of union options, which are no keys of anything."""
    path: list[str | int] = []
    for key in detail["loc"]:
        if (isinstance(values, Mapping) and key in values) or (isinstance(values, list) and isinstance(key, int)):
            values = values[key]  # pyright: ignore[reportCallIssue, reportArgumentType] - checked on the line above
            path.append(key)
    if detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return tuple(path)


def _problem(
    model: type[Settings],
    tree: Tree,
    at: KeyPath,
    path: KeyPath,
    detail: ErrorDetails,
    also_known: Sequence[str],
) -> Problem:
    name, where = dotted((*at, *path)), tree.place((*at, *path))
    if detail["type"] == "extra_forbidden":
        return _unknown(model, path, at, where, also_known)
    if detail["type"] == "value_error":
        reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
        return Problem(f"{name}: {reason}" if name else reason, where)
    found = schema_at(model, path)
    takes = in_words(*found) if found else detail["msg"]
    if detail["type"] == "missing":
        return Problem(f"{name} is required", where, f"it takes {takes}")
    return Problem(f"{name} is {_shown(detail['input'])} and must be {takes}", where)


def _unknown(model: type[Settings], path: KeyPath, at: KeyPath, where: str, also_known: Sequence[str]) -> Problem:
    section, key = path[:-1], str(path[-1])
    what = f"{dotted((*at, *section)) or 'a pipeline'} has no setting {key}"
    # A right name in the wrong section is likelier meant than a similar one in the right section.
    elsewhere = [field.path for field in describe(model) if field.path.rpartition(".")[2] == key]
    if elsewhere:
        return Problem(what, where, f"did you mean {' or '.join(dotted((*at, name)) for name in elsewhere)}?")
    known = names_at(model, section) + ([] if section else list(also_known))
    return Problem(what, where, suggestion(key, known) or f"known: {', '.join(known)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
