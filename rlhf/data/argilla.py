"""Read records as Argilla 2 exports them.

There are three forms. The server's own records (``/api/v1/datasets/ID/records?include=responses``) hold, for each user,
the status and the answers. Its export to the hub and the SDK's ``to_datasets`` are flat: beside the fields there are
the columns ``QUESTION.responses``, ``QUESTION.responses.users`` and ``QUESTION.responses.status``. The SDK's
``to_json`` holds the answers by question, and no status.

The SDK writes a ranking as the options' names without their ranks, in the order of the dataset's settings rather than
the annotator's (argilla-io/argilla, issues 5677 and 5712). Such a file does not hold the annotator's order, so it is
refused. The server's two forms have the ranks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.annotations import (
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

ANSWERS, USERS, STATUSES = ".responses", ".responses.users", ".responses.status"
_NOT_FIELDS = ("id", "_server_id", "status", "inserted_at", "updated_at", "score")
_NOT_FIELDS_IN = (".suggestion", ".suggestion.score", ".suggestion.agent", ANSWERS, USERS, STATUSES)
_METADATA = "metadata."
_LEFT_OUT = {"draft": "draft responses", "discarded": "discarded responses"}


class _Given(NamedTuple):
    """One user's answer to one question."""

    user: str
    status: str | None
    question: str
    value: Any
    where: str


def recognises(record: Record) -> bool:
    """Return whether a record has one of the three forms."""
    return {"fields", "responses"} <= set(record) or any(key.endswith(ANSWERS) for key in record)


def fields_of(records: Sequence[Record]) -> Record:
    """Return the fields that annotators saw. In a flat record of the SDK they include metadata, which has no mark."""
    (record,) = records
    if "fields" in record:
        if not isinstance(fields := record["fields"], Mapping):
            raise MalformedError("fields", "must be an object")
        return fields
    return {
        key: value
        for key, value in record.items()
        if key not in _NOT_FIELDS and not key.endswith(_NOT_FIELDS_IN) and not key.startswith((_METADATA, "vector."))
    }


def read(records: Sequence[Record], layout: Layout, wanted: Wanted) -> Annotated:
    """Read the submitted answers of a record."""
    (record,) = records
    if "fields" not in record:
        metadata: Any = {key.removeprefix(_METADATA): value for key, value in record.items()}
    elif not isinstance(metadata := record.get("metadata"), Mapping):
        metadata = {}
    annotated = Annotated.of(fields_of(records), metadata, layout)
    kept: dict[str, str | None] = {}
    refused: dict[str, str] = {}
    for given in _answers(record):
        if given.question:
            annotated.questions.add(given.question)
        if isinstance(given.status, str) and given.status in _LEFT_OUT:
            refused[given.user] = given.status
        elif given.status not in (None, "submitted"):
            raise MalformedError(given.where, f"has the status {given.status!r}, not submitted, draft or discarded")
        elif given.value is not None and (not wanted.questions or given.question in wanted.questions):
            kept[given.user] = given.status
            annotated.add(given.question, _comparison(annotated, given))
    annotated.left_out.update(_LEFT_OUT[status] for status in refused.values())
    annotated.unknown_status = sum(status is None for status in kept.values())
    return annotated


def _answers(record: Record) -> Iterator[_Given]:
    """Yield the answers of a record in any of the three forms. Users whose account was deleted are numbered."""
    nameless = Counter[str]()

    def user(identifier: Any, question: str) -> str:
        if identifier not in (None, "None"):
            return str(identifier)
        nameless[question] += 1
        return f"deleted user {nameless[question]}"

    if "fields" not in record:
        for key in record:
            if key.endswith(ANSWERS):
                question = key.removesuffix(ANSWERS)
                for number, (value, identifier, status) in enumerate(_columns(record, question)):
                    yield _Given(user(identifier, question), status, question, value, f"{key}[{number}]")
        return
    match record.get("responses"):
        case None:
            return
        case Mapping() as by_question:
            for question, answers in by_question.items():
                if not isinstance(answers, list):
                    raise MalformedError(f"responses.{question}", "must be a list of answers")
                for number, answer in enumerate(answers):
                    where = f"responses.{question}[{number}]"
                    if not isinstance(answer, Mapping) or "value" not in answer:
                        raise MalformedError(where, "must be an object with value and user_id")
                    name = user(answer.get("user_id"), question)
                    yield _Given(name, answer.get("status"), question, answer["value"], f"{where}.value")
        case list() as by_user:
            for number, response in enumerate(by_user):
                where = f"responses[{number}]"
                if not isinstance(response, Mapping) or "status" not in response:
                    raise MalformedError(where, "must be an object with user_id, status and values")
                name, values = user(response.get("user_id"), ""), response.get("values") or {}
                if not isinstance(values, Mapping):
                    raise MalformedError(f"{where}.values", "must be an object by question")
                if not values:
                    yield _Given(name, response["status"], "", None, where)
                for question, answer in values.items():
                    where = f"responses[{number}].values.{question}"
                    if not isinstance(answer, Mapping) or "value" not in answer:
                        raise MalformedError(where, "must be an object with a value")
                    yield _Given(name, response["status"], question, answer["value"], f"{where}.value")
        case _:
            raise MalformedError("responses", "must be an object by question, or a list with one object for each user")


def _columns(record: Record, question: str) -> Iterator[tuple[Any, Any, Any]]:
    """Return value, user and status of each answer to a question in a flat record."""
    key = question + ANSWERS
    values, users = record[key] or [], record.get(question + USERS) or []
    statuses = record.get(question + STATUSES) or [None] * len(values)
    if not all(isinstance(column, list) for column in (values, users, statuses)):
        raise MalformedError(key, "and its users and status must be lists")
    if not len(values) == len(users) == len(statuses):
        raise MalformedError(key, f"has {len(values)} answers of {len(users)} users with {len(statuses)} statuses")
    return zip(values, users, statuses, strict=True)


def _comparison(annotated: Annotated, given: _Given) -> AnnotatorRanking | AnnotatorRating | None:
    """Return an answer that compares responses; None for one that does not."""
    user, question, value, known = given.user, given.question, given.value, annotated.known
    if is_number(value):
        name = mentioned(question, known)
        return AnnotatorRating(user, question, name, value) if name in annotated.responses else None
    places = None
    if isinstance(value, str):
        places = preference(value, list(annotated.responses))
    elif isinstance(value, list) and value:
        if any(isinstance(option, Mapping) and ("value" in option or "rank" in option) for option in value):
            places = _places(value, annotated, given.where)
        # The labels of a question about something else would not all name responses.
        elif all(isinstance(option, str) and meant(option, known, ranked=True) for option in value):
            raise MalformedError(
                given.where,
                "is a ranking without ranks: Argilla's SDK leaves them out; export with the server "
                "(/api/v1/datasets/ID/records?include=responses, or to the hub from its page)",
            )
    return None if places is None else AnnotatorRanking(user, question, places)


def _places(value: list[Any], annotated: Annotated, where: str) -> list[list[str]]:
    by_rank: dict[float, list[str]] = {}
    for number, option in enumerate(value):
        at = f"{where}[{number}]"
        if not isinstance(option, Mapping) or not isinstance(label := option.get("value"), str):
            raise MalformedError(f"{at}.value", "must be the name of an option")
        rank = option.get("rank")
        if not is_number(rank) or rank != rank:  # NaN alone differs from itself
            raise MalformedError(f"{at}.rank", "is missing" if rank is None else f"is {rank!r}, and must be a number")
        name = meant(label, annotated.known, ranked=True)
        if name is None:
            problem = f"names {label!r}, and the responses are {', '.join(annotated.known)}"
            raise MalformedError(f"{at}.value", problem)
        if any(name in place for place in by_rank.values()):
            raise MalformedError(f"{at}.value", f"names response {name} twice")
        by_rank.setdefault(rank, []).append(name)
    ordered = [[name for name in by_rank[rank] if name in annotated.responses] for rank in sorted(by_rank)]
    return [place for place in ordered if place]
