"""Tasks as Label Studio 1 exports them, as JSON and as JSON_MIN.

JSON has one object a task, with ``data`` and ``annotations``; each annotation has ``completed_by``, ``was_cancelled``
and ``result``, a list of what its tags hold. JSON_MIN has one flat object an annotation: the data, ``id`` of the task,
a key for each tag, and ``annotator``; cancelled ones are not in it. Objects of one task follow one another.

Read are the tags Pairwise (``selected``: left or right), Ranker (ids of a List's items from best to worst, or in
groups), Rating and Choices. The export does not say which field is on the left: it is the first of the responses.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.imports.naming import (
    SIDES,
    Annotated,
    MalformedError,
    Ranked,
    Rated,
    is_number,
    meant,
    mentioned,
    preference,
)
from rlhf.data.imports.record_fields import Layout, Wanted, all_names, read_models, read_responses

Record = Mapping[str, Any]

_FLAT = ("annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")
_FLAT_TAGS = {"selected": "pairwise", "ranker": "ranker", "rating": "rating"}


class _Result(NamedTuple):
    """What one tag of one annotation holds."""

    kind: str
    question: str
    target: str
    """The tag that was annotated, where the export says so: the response of a rating."""
    value: Any
    where: str


class _Annotation(NamedTuple):
    """One annotation of a task."""

    annotator: str
    updated: str
    results: list[_Result]


def recognises(record: Record) -> bool:
    """Whether a record is a task of JSON, or an annotation of JSON_MIN."""
    return {"data", "annotations"} <= set(record) or _is_flat(record)


def _is_flat(record: Record) -> bool:
    return {"annotator", "annotation_id"} <= set(record)


def belongs(record: Record, previous: Record) -> bool:
    """Whether a record is another annotation of the previous one's task."""
    return _is_flat(record) and _is_flat(previous) and "id" in record and record["id"] == previous.get("id")


def fields_of(records: Sequence[Record]) -> Record:
    """The data of a task; in JSON_MIN with what its tags hold, since nothing tells them apart."""
    record = records[0]
    if _is_flat(record):
        return {key: value for key, value in record.items() if key not in (*_FLAT, "id") and not _flat_tag(value)}
    if not isinstance(data := record.get("data"), Mapping):
        raise MalformedError("data", "must be an object" if "data" in record else "is missing")
    return data


def read(records: Sequence[Record], layout: Layout, wanted: Wanted) -> Annotated:
    """Read a task's annotations that were not cancelled; of several by one person the newest.

    Raises:
        MalformedError: a result is not of its tag's form, or names a response that is not there.

    """
    data = fields_of(records)
    responses = read_responses(data, layout)
    found = Annotated(data.get(layout.prompt), responses, read_models(data, layout, list(responses)))
    if len(responses) < 2:
        return found
    if _is_flat(records[0]):
        annotations = [_flat_annotation(record, layout, wanted) for record in records]
    else:
        annotations = _annotations(records[0], found.left_out)
    newest: dict[str, _Annotation] = {}
    for one in sorted(annotations, key=lambda one: one.updated):
        found.left_out["annotations that the same person made anew"] += one.annotator in newest
        newest[one.annotator] = one
    for one in newest.values():
        found.left_out["annotations without an answer"] += not one.results
        for result in one.results:
            found.questions.add(result.question)
            if not wanted.questions or result.question in wanted.questions:
                _take(found, one.annotator, result, all_names(layout, responses), wanted)
    found.left_out = +found.left_out
    return found


def _annotations(task: Record, left_out: Counter[str]) -> list[_Annotation]:
    annotations, drafts = task.get("annotations"), task.get("drafts")
    if not isinstance(annotations, list):
        raise MalformedError("annotations", "must be a list" if "annotations" in task else "is missing")
    left_out["drafts"] += len(drafts) if isinstance(drafts, list) else 0
    found: list[_Annotation] = []
    for number, one in enumerate(annotations):
        where = f"annotations[{number}]"
        if not isinstance(one, Mapping) or not isinstance(results := one.get("result"), list):
            raise MalformedError(f"{where}.result", "must be a list")
        if one.get("was_cancelled"):
            left_out["cancelled annotations"] += 1
            continue
        results = [_result(result, f"{where}.result[{at}]") for at, result in enumerate(results)]
        found.append(_Annotation(_person(one.get("completed_by"), where), str(one.get("updated_at", "")), results))
    return found


def _person(completed_by: Any, where: str) -> str:
    """Name a person as JSON_MIN does: by e-mail where the export has it, else by number."""
    if isinstance(completed_by, Mapping):
        completed_by = completed_by.get("email") or completed_by.get("id")
    if completed_by is None:
        raise MalformedError(f"{where}.completed_by", "is missing: export with the details of users")
    return str(completed_by)


def _result(result: Any, where: str) -> _Result:
    if not isinstance(result, Mapping) or not isinstance(value := result.get("value"), Mapping):
        raise MalformedError(f"{where}.value", "must be an object")
    kind, question = str(result.get("type", "")).casefold(), str(result.get("from_name", ""))
    return _Result(kind, question, str(result.get("to_name", "")), value.get(_VALUE.get(kind, kind)), where)


_VALUE = {kind: key for key, kind in _FLAT_TAGS.items()}
"""Under which key a tag's value is, where it is not the tag's own name."""


def _flat_tag(value: Any) -> str:
    """The kind of tag that a value of JSON_MIN comes from: an object in a list; empty for one of data or Choices."""
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}
    return next((kind for key, kind in _FLAT_TAGS.items() if set(first) == {key}), "")


def _flat_annotation(record: Record, layout: Layout, wanted: Wanted) -> _Annotation:
    return _Annotation(
        _person(record["annotator"], "annotator"),
        str(record.get("updated_at", "")),
        [*_flat_results(record, layout, wanted)],
    )


def _flat_results(record: Record, layout: Layout, wanted: Wanted) -> Iterator[_Result]:
    for key, value in record.items():
        if kind := _flat_tag(value):
            for number, one in enumerate(value):
                yield _Result(kind, key, "", one.get(_VALUE[kind]), f"{key}[{number}]")
        elif key in (*_FLAT, "id", layout.prompt, *layout.responses) or not isinstance(value, str):
            continue
        elif key in wanted.questions or preference(value, layout.responses):
            # A text may be data as well as a choice: what chooses no response is data, unless it was asked for.
            yield _Result("choices", key, "", [value], key)


def _take(found: Annotated, annotator: str, result: _Result, known: Sequence[str], wanted: Wanted) -> None:
    """Add a result that compares responses; count one that does not. ``known`` has the null responses' names too."""
    names = list(found.responses)
    match result.kind:
        case "pairwise":
            places = _pair(result, names)
        case "ranker":
            places = _ranking(result, names, wanted)
        case "choices":
            if not isinstance(result.value, list) or not all(isinstance(one, str) for one in result.value):
                raise MalformedError(f"{result.where}.value.choices", "must be a list of texts")
            places = preference(result.value[0], names) if len(result.value) == 1 else None
        case "rating":
            if not is_number(result.value):
                raise MalformedError(f"{result.where}.value.rating", "must be a number")
            name = meant(result.target, known, ranked=False) or mentioned(result.question, known)
            if name is not None and name in found.responses:
                found.said.append(Rated(annotator, result.question, name, result.value))
                return
            places = None
        case _:
            places = None
    if places is None:
        found.left_out[f"answers to {result.question}, which compare no responses"] += 1
    else:
        found.said.append(Ranked(annotator, result.question, places))


def _pair(result: _Result, names: list[str]) -> list[list[str]]:
    if result.value not in SIDES:
        raise MalformedError(f"{result.where}.value.selected", f"is {result.value!r}, and must be left or right")
    shown = [name.strip() for name in result.target.split(",")]
    if sorted(shown) != sorted(names):
        shown = names
    if len(shown) != 2:
        raise MalformedError(result.where, f"chooses between left and right, and there are {len(names)} responses")
    best = shown[SIDES.index(result.value)]
    return [[best], [name for name in names if name != best]]


def _ranking(result: _Result, names: list[str], wanted: Wanted) -> list[list[str]]:
    where = f"{result.where}.value.ranker"
    value = result.value
    if isinstance(value, Mapping) and set(value) == {result.question}:
        value = value[result.question]
    if isinstance(value, Mapping):
        if not wanted.groups:
            groups = ", ".join(map(str, value))
            raise MalformedError(where, f"sorts into the groups {groups}; say which is best with --groups BEST,WORSE")
        places = [value.get(group) or [] for group in wanted.groups]
        if missing := [group for group in wanted.groups if group not in value]:
            raise MalformedError(where, f"has no group {missing[0]!r}, only {', '.join(map(str, value))}")
    else:
        places = [[one] for one in value] if isinstance(value, list) else [value]
    if not all(isinstance(place, list) for place in places):
        raise MalformedError(where, "must be a list of ids, or an object of such lists")
    ids = [[str(one) for one in place] for place in places]
    seen = Counter(one for place in ids for one in place)
    if unknown := [one for one in seen if one not in names]:
        raise MalformedError(where, f"names {unknown[0]!r}, and the responses are {', '.join(names)}")
    if twice := [one for one, count in seen.items() if count > 1]:
        raise MalformedError(where, f"names response {twice[0]} twice")
    return [place for place in ids if place]
