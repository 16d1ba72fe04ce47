"""What is wrong with the values of settings, in the words of the pipeline file, with places and what to write."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlhf.config.base import (
    Forms,
    Settings,
    describe,
    forms_at,
    in_words,
    names_at,
    nearest,
    schema_at,
    suggestion,
)
from rlhf.config.yaml_tree import KeyPath, Problem, Tree, dotted

AnySettings = TypeVar("AnySettings", bound=Settings)


def validated(
    model: type[AnySettings], values: Mapping[str, Any], tree: Tree, at: KeyPath, also_known: Sequence[str] = ()
) -> AnySettings | None:
    """Return ``values`` as settings, or None after adding what is wrong with them to ``tree.problems``.

    at          path of the values in the tree
    also_known  names that are allowed beside the model's own, to be suggested for an unknown name
    """
    try:
        # Strict: text is no number, a number no truth value. From JSON a list may still fill a tuple, and text a path.
        return model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        written, seen = _Written(model, values, tree, at, also_known), set[KeyPath]()
        for detail in error.errors(include_url=False):
            path = written.path(detail)
            # A union complains once for each of its options.
            if path not in seen:
                seen.add(path)
                tree.problems.append(written.problem(path, detail))
        return None


@dataclass(frozen=True)
class _Written:
    """The arguments of :func:`validated`."""

    model: type[Settings]
    values: Mapping[str, Any]
    tree: Tree
    at: KeyPath
    also_known: Sequence[str]

    def path(self, detail: ErrorDetails) -> KeyPath:
        """Return pydantic's location without the names of union options, which are no keys of anything."""
        path: list[str | int] = []
        values: Any = self.values
        names_form = False
        for key in detail["loc"]:
            if names_form:  # it may also be the name of a setting that was written
                names_form = False
            elif (isinstance(values, Mapping) and key in values) or (isinstance(values, list) and isinstance(key, int)):
                values = values[key]  # pyright: ignore[reportCallIssue, reportArgumentType] - checked on the line above
                path.append(key)
                names_form = forms_at(self.model, tuple(path)) is not None
        if detail["type"] == "missing":
            path.append(detail["loc"][-1])
        elif detail["type"] in ("union_tag_not_found", "union_tag_invalid"):
            path.append(detail.get("ctx", {})["discriminator"].strip("'"))
        return tuple(path)

    def problem(self, path: KeyPath, detail: ErrorDetails) -> Problem:
        """Say in words what pydantic found wrong at ``path``."""
        name, where = dotted((*self.at, *path)), self.tree.place((*self.at, *path))
        given, hint = detail["input"], ""
        schema = schema_at(self.model, path, self.values)
        takes = in_words(*schema) if schema else detail["msg"]
        match detail["type"]:
            case "extra_forbidden":
                return self._unknown(path, where)
            case "value_error":
                reason = str(detail.get("ctx", {}).get("error", detail["msg"]))
                return Problem(f"{name}: {reason}" if name else reason, where)
            case "missing":
                return Problem(f"{name} is required", where, f"it takes {takes}")
            case "union_tag_not_found":
                with_these = _forms_with(forms_at(self.model, path[:-1]), given)
                return Problem(f"{name} is required", where, f"it takes {with_these or takes}")
            case "union_tag_invalid":
                given = given[path[-1]]
                close = _nearest_form(forms_at(self.model, path[:-1]), given)
                hint = f"did you mean {close}?" if close else ""
            case _ if close := _nearest_form(forms := forms_at(self.model, path), given):
                hint = f"write {{{forms.by}: {close}}}" if forms else ""
            case _:
                pass
        value = json.dumps(given, ensure_ascii=False)
        return Problem(f"{name} is {value if len(value) <= 60 else value[:59] + '…'} and must be {takes}", where, hint)

    def _unknown(self, path: KeyPath, where: str) -> Problem:
        section, key = path[:-1], str(path[-1])
        name = dotted((*self.at, *section))
        what, known = f"{name or 'a pipeline'} has no setting {key}", names_at(self.model, section)
        if (forms := forms_at(self.model, section)) is not None:
            values: Any = self.values
            for part in section:
                values = values[part]
            chosen, chosen_at = values[forms.by], self.tree.place((*self.at, *section, forms.by))
            what, known = f"{what} for {forms.by} {chosen}", forms.names[chosen]
            if others := [form for form, names in forms.names.items() if key in names]:
                hint = f"{key} belongs to {', '.join(others)}"
                if chosen_at != where and chosen_at.startswith("override "):
                    hint += f"; {name}={{{forms.by}: {chosen}}} replaces the whole section"
                return Problem(what, where, hint)
        # A right name in the wrong section is likelier meant than a similar name in the right section.
        elsewhere = dict.fromkeys(field.path for field in describe(self.model) if field.path.rpartition(".")[2] == key)
        if elsewhere:
            return Problem(what, where, f"did you mean {' or '.join(dotted((*self.at, name)) for name in elsewhere)}?")
        known = [*known, *([] if section else self.also_known)]
        return Problem(what, where, suggestion(key, known) or f"known: {', '.join(known)}")


def _forms_with(forms: Forms | None, names: Collection[str]) -> str:
    """Return the forms that have all settings of these ``names``, in words; "" where those are none or all."""
    having = [form for form, known in forms.names.items() if set(names) <= set(known)] if forms and names else []
    return f"{' or '.join(having)}, which {'has' if len(having) == 1 else 'have'} {', '.join(names)}" if having else ""


def _nearest_form(forms: Forms | None, given: Any) -> str | None:
    return nearest(given, forms.names) if forms and isinstance(given, str) else None
