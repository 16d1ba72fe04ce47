"""Which fields of a record hold the prompt and the responses. Pure."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.imports.naming import MalformedError, Marked, marked, mentioned, words

PROMPT_FIELDS = ("prompt", "instruction", "question", "query")
"""What the tools' own templates and their users call the prompt."""


class Wanted(NamedTuple):
    """What the command line says of an export; empty where the export tells itself."""

    prompt: str | None = None
    responses: tuple[str, ...] = ()
    """Fields with a response each, or one field that lists them all."""
    questions: tuple[str, ...] = ()
    """Questions to take answers from; of a public data set the field of the ratings."""
    groups: tuple[str, ...] = ()
    """Groups that responses were sorted into, best first."""


class Layout(NamedTuple):
    """Where prompt and responses are."""

    prompt: str
    responses: tuple[str, ...]


def find_layout(fields: Mapping[str, Any], wanted: Wanted) -> Layout:
    """Tell the fields of prompt and responses by their names.

    Responses are fields whose names differ in their last number, letter or side only, or one field that lists items
    with an ``id``. The prompt is a field of a usual name, or the only text left.

    Raises:
        MalformedError: the names tell too little.

    """
    responses = wanted.responses or _responses(fields, wanted.prompt)
    prompt = wanted.prompt or _prompt(fields, responses)
    if prompt in responses:
        raise MalformedError("", f"field {prompt!r} cannot be both the prompt and a response")
    return Layout(prompt, responses)


def _responses(fields: Mapping[str, Any], prompt: str | None) -> tuple[str, ...]:
    series: dict[tuple[str, ...], dict[str, Marked]] = defaultdict(dict)
    for name, value in fields.items():
        found = marked(name)
        if found and name != prompt and "model" not in found.stem and (value is None or _is_text(value)):
            series[found.stem][name] = found
    found = [tuple(sorted(one, key=lambda name: _order(one[name].mark))) for one in series.values() if len(one) > 1]
    found += [(name,) for name, value in fields.items() if _lists_items(value)]
    if len(found) != 1:
        raise MalformedError("", f"which fields are the responses cannot be told from their names: {_listed(fields)}")
    return found[0]


def _prompt(fields: Mapping[str, Any], responses: Sequence[str]) -> str:
    rest = [name for name, value in fields.items() if name not in responses and _is_text(value)]
    found = [name for name in rest if name.casefold() in PROMPT_FIELDS] or rest
    if len(found) != 1:
        raise MalformedError("", f"which field is the prompt cannot be told from their names: {_listed(fields)}")
    return found[0]


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, fields)) or "there are none"


def _order(mark: str) -> tuple[int, str]:
    """Numbers by their value, letters and sides as in the alphabet."""
    return (len(mark), mark) if mark.isdecimal() else (0, mark)


def _is_text(value: Any) -> bool:
    """Whether a value is a text or a conversation."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "role" in one for one in value)


def _lists_items(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) and "id" in one for one in value)


def read_responses(fields: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The responses by name, without those that are null: fields may be optional, and then answers skip them.

    Raises:
        MalformedError: the field that lists the responses is no list of items with an ``id`` each.

    """
    if len(layout.responses) != 1:
        return {name: fields[name] for name in layout.responses if fields.get(name) is not None}
    name = layout.responses[0]
    items = fields.get(name)
    if not isinstance(items, list) or not all(isinstance(one, Mapping) and "id" in one for one in items):
        raise MalformedError(name, "must list the responses as objects with an id")
    # Label Studio shows an item's title above its body; where there is no body, the title is all that was read.
    found = {str(one["id"]): one.get("body", one.get("title")) for one in items}
    if len(found) != len(items):
        raise MalformedError(name, "has two items of the same id")
    return found


def all_names(layout: Layout, responses: Mapping[str, Any]) -> Sequence[str]:
    """The names by which answers may call responses, those that are null in this record included."""
    return layout.responses if len(layout.responses) > 1 else list(responses)


def read_models(metadata: Mapping[str, Any], layout: Layout, names: Sequence[str]) -> list[str] | None:
    """The models that wrote the responses, where metadata names one for each; else None.

    They are a list ``models`` in the order of the fields, or a text for each response under a name that has ``model``
    and the response's name or mark in it, such as ``model_1`` or ``response-1-model``.
    """
    listed = metadata.get("models")
    places = layout.responses if len(layout.responses) > 1 else names
    if isinstance(listed, list) and len(listed) == len(places) and all(isinstance(one, str) for one in listed):
        by_name = dict(zip(places, listed, strict=True))
        return [by_name[name] for name in names]
    found = {
        name: value
        for key, content in metadata.items()
        if "model" in words(key)
        and isinstance(value := _only(content), str)
        and (name := mentioned(key, names) or _of_mark(key, names))
    }
    return [found[name] for name in names] if set(found) == set(names) else None


def _of_mark(key: str, names: Sequence[str]) -> str | None:
    rest = tuple(word for word in words(key) if word not in ("model", "name"))
    found = [name for name in names if (other := marked(name)) and (other.mark,) == rest]
    return found[0] if len(found) == 1 else None


def _only(value: Any) -> Any:
    """The one element of a list: Argilla writes metadata of terms as lists when it exports to the hub."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
