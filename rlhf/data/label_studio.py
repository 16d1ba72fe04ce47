"""Read tasks as Label Studio 1 exports them, as JSON and as JSON_MIN.

JSON has one object a task, with ``data`` and ``annotations``; each annotation has ``completed_by``, ``was_cancelled``
and ``result``, a list of the values of its tags. JSON_MIN has one flat object an annotation: the data, ``id`` of the
task, a key for each tag, and ``annotator``; cancelled ones are not in it. Objects of one task are consecutive.

The tags Pairwise (``selected``: left or right), Ranker (ids of a List's items from best to worst, or in groups), Rating
and Choices are read. The export does not say which field is on the left: it is the first of the responses.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.annotations import (
    SIDES,
    Annotated,
    AnnotatorRanking,
    AnnotatorRating,
    Layout,
    Record,
    Wanted,
    is_number,
    meant,
    mentioned,
    preference,
)
from rlhf.data.records import MalformedError

_FLAT = ("annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement")
_FLAT_TAGS = {"selected": "pairwise", "ranker": "ranker", "rating": "rating"}
_VALUE = {kind: key for key, kind in _FLAT_TAGS.items()}
"""The key of a tag's value, where it is not the tag's own name."""


class _Result(NamedTuple):
    """The value of one tag in one annotation."""

    kind: str
    question: str
    target: str
    """The tag that was annotated, where the export has it: the response of a rating."""
    value: Any
    where: str


class _Annotation(NamedTuple):
    """One annotation of a task."""

    annotator: str
    updated: str
    results: list[_Result]


def recognises(record: Record) -> bool:
    """Return whether a record is a task of JSON, or an annotation of JSON_MIN."""
    return {"data", "annotations"} <= set(record) or _is_flat(record)


def _is_flat(record: Record) -> bool:
    return {"annotator", "annotation_id"} <= set(record)


def belongs(record: Record, previous: Record) -> bool:
    """Return whether a record is another annotation of the previous one's task."""
    return _is_flat(record) and _is_flat(previous) and "id" in record and record["id"] == previous.get("id")


def fields_of(records: Sequence[Record]) -> Record:
    """Return the data of a task; in JSON_MIN it includes texts that tags hold, which have no mark."""
    record = records[0]
    if _is_flat(record):
        return {key: value for key, value in record.items() if key not in (*_FLAT, "id") and not _flat_tag(value)}
    if not isinstance(data := record.get("data"), Mapping):
        raise MalformedError("data", "must be an object" if "data" in record else "is missing")
    return data


def read(records: Sequence[Record], layout: Layout, wanted: Wanted) -> Annotated:
    """Read a task's annotations that were not cancelled; of several by one person the newest."""
    data = fields_of(records)
    annotated = Annotated.of(data, data, layout)
    if len(annotated.responses) < 2:
        return annotated
    if _is_flat(records[0]):
        annotations = [_flat_annotation(record, layout, wanted) for record in records]
    else:
        annotations = _annotations(records[0], annotated.left_out)
    newest: dict[str, _Annotation] = {}
    for annotation in sorted(annotations, key=lambda annotation: annotation.updated):
        annotated.left_out["annotations that the same person replaced"] += annotation.annotator in newest
        newest[annotation.annotator] = annotation
    for annotation in newest.values():
        annotated.left_out["annotations without an answer"] += not annotation.results
        for result in annotation.results:
            annotated.questions.add(result.question)
            if not wanted.questions or result.question in wanted.questions:
                annotated.add(result.question, _comparison(annotated, annotation.annotator, result, wanted))
    annotated.left_out = +annotated.left_out
    return annotated


def _annotations(task: Record, left_out: Counter[str]) -> list[_Annotation]:
    annotations, drafts = task.get("annotations"), task.get("drafts")
    if not isinstance(annotations, list):
        raise MalformedError("annotations", "must be a list" if "annotations" in task else "is missing")
    left_out["drafts"] += len(drafts) if isinstance(drafts, list) else 0
    kept: list[_Annotation] = []
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        if not isinstance(annotation, Mapping) or not isinstance(results := annotation.get("result"), list):
            raise MalformedError(f"{where}.result", "must be a list")
        if annotation.get("was_cancelled"):
            left_out["cancelled annotations"] += 1
            continue
        read_results: list[_Result] = []
        for index, result in enumerate(results):
            at = f"{where}.result[{index}]"
            if not isinstance(result, Mapping) or not isinstance(value := result.get("value"), Mapping):
                raise MalformedError(f"{at}.value", "must be an object")
            kind, question = str(result.get("type", "")).casefold(), str(result.get("from_name", ""))
            content = value.get(_VALUE.get(kind, kind))
            read_results.append(_Result(kind, question, str(result.get("to_name", "")), content, at))
        person = _person(annotation.get("completed_by"), where)
        kept.append(_Annotation(person, str(annotation.get("updated_at", "")), read_results))
    return kept


def _person(completed_by: Any, where: str) -> str:
    """Name a person as JSON_MIN does: by e-mail where the export has it, else by number."""
    if isinstance(completed_by, Mapping):
        completed_by = completed_by.get("email") or completed_by.get("id")
    if completed_by is None:
        raise MalformedError(f"{where}.completed_by", "is missing: export with the details of users")
    return str(completed_by)


def _flat_tag(value: Any) -> str:
    """Return the kind of tag of a value in JSON_MIN, an object in a list; empty for a value of data or Choices."""
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], Mapping) else {}
    return next((kind for key, kind in _FLAT_TAGS.items() if set(first) == {key}), "")


def _flat_annotation(record: Record, layout: Layout, wanted: Wanted) -> _Annotation:
    person, results = _person(record["annotator"], "annotator"), list[_Result]()
    for key, value in record.items():
        if kind := _flat_tag(value):
            if not all(isinstance(item, Mapping) for item in value):
                raise MalformedError(key, "must be a list of objects")
            values = [item.get(_VALUE[kind]) for item in value]
            results += [_Result(kind, key, "", content, f"{key}[{index}]") for index, content in enumerate(values)]
        elif key in (*_FLAT, "id", layout.prompt, *layout.responses) or not isinstance(value, str):
            continue
        elif key in wanted.questions or preference(value, layout.responses):
            # A text may be data as well as a choice: one that chooses no response is data, unless it was asked for.
            results.append(_Result("choices", key, "", [value], key))
    return _Annotation(person, str(record.get("updated_at", "")), results)


def _comparison(
    annotated: Annotated, annotator: str, result: _Result, wanted: Wanted
) -> AnnotatorRanking | AnnotatorRating | None:
    """Return a result that compares responses; None for one that does not."""
    names, value = list(annotated.responses), result.value
    match result.kind:
        case "pairwise":
            if value not in SIDES:
                raise MalformedError(f"{result.where}.value.selected", f"is {value!r}, and must be left or right")
            # Where the tag names the two texts, their order is that on the page.
            shown = [name.strip() for name in result.target.split(",")]
            if sorted(shown) != sorted(names):
                shown = names
            if len(shown) != 2:
                problem = f"chooses between left and right, and there are {len(shown)} responses"
                raise MalformedError(result.where, problem)
            best = SIDES.index(value)
            places = [[shown[best]], [shown[1 - best]]]
        case "ranker":
            places = _ranking(result, names, wanted)
        case "choices":
            if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
                raise MalformedError(f"{result.where}.value.choices", "must be a list of texts")
            places = preference(value[0], names) if len(value) == 1 else None
        case "rating":
            if not is_number(value):
                raise MalformedError(f"{result.where}.value.rating", "must be a number")
            name = meant(result.target, annotated.known, ranked=False) or mentioned(result.question, annotated.known)
            return AnnotatorRating(annotator, result.question, name, value) if name in annotated.responses else None
        case _:
            places = None
    return None if places is None else AnnotatorRanking(annotator, result.question, places)


def _ranking(result: _Result, names: list[str], wanted: Wanted) -> list[list[str]]:
    where, value = f"{result.where}.value.ranker", result.value
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
        places = [[item] for item in value] if isinstance(value, list) else [value]
    if not all(isinstance(place, list) for place in places):
        raise MalformedError(where, "must be a list of ids, or an object of such lists")
    ids = [[str(item) for item in place] for place in places]
    counts = Counter(item for place in ids for item in place)
    if unknown := [item for item in counts if item not in names]:
        raise MalformedError(where, f"names {unknown[0]!r}, and the responses are {', '.join(names)}")
    if twice := [item for item, count in counts.items() if count > 1]:
        raise MalformedError(where, f"names response {twice[0]} twice")
    return [place for place in ids if place]
