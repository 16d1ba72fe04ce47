"""Records as Argilla 2 exports them.

Three forms are read. The server's own records (``/api/v1/datasets/ID/records?include=responses``) hold, for each user,
the status and the answers. Its export to the hub and the SDK's ``to_datasets`` are flat: beside the fields there are
the columns ``QUESTION.responses``, ``QUESTION.responses.users`` and ``QUESTION.responses.status``. The SDK's
``to_json`` holds the answers by question, and no status.

The SDK writes a ranking as the options' names without their ranks, in the order of the dataset's settings rather than
the annotator's (argilla-io/argilla, issues 5677 and 5712). What the annotator said is not in such a file, so it is
refused. The server's two forms have the ranks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.imports.naming import Annotated, MalformedError, Ranked, Rated, is_number, meant, mentioned, preference
from rlhf.data.imports.record_fields import Layout, Wanted, all_names, read_models, read_responses

Record = Mapping[str, Any]

ANSWERS, USERS, STATUSES = ".responses", ".responses.users", ".responses.status"
_NOT_FIELDS = ("id", "_server_id", "status", "inserted_at", "updated_at", "score")
_NOT_FIELDS_IN = (".suggestion", ".suggestion.score", ".suggestion.agent", ANSWERS, USERS, STATUSES)
_METADATA = "metadata."
_VECTOR = "vector."
_LEFT_OUT = {"draft": "draft responses", "discarded": "discarded responses"}


class _Given(NamedTuple):
    """One user's answer to one question."""

    user: str
    status: str | None
    question: str
    value: Any
    where: str


def recognises(record: Record) -> bool:
    """Whether a record has one of the three forms."""
    return {"fields", "responses"} <= set(record) or any(key.endswith(ANSWERS) for key in record)


def fields_of(records: Sequence[Record]) -> Record:
    """What annotators were shown. In a flat record the SDK puts metadata among it, and nothing tells them apart."""
    (record,) = records
    if "fields" in record:
        if not isinstance(fields := record["fields"], Mapping):
            raise MalformedError("fields", "must be an object")
        return fields
    return {
        key: value
        for key, value in record.items()
        if key not in _NOT_FIELDS and not key.endswith(_NOT_FIELDS_IN) and not key.startswith((_METADATA, _VECTOR))
    }


def read(records: Sequence[Record], layout: Layout, wanted: Wanted) -> Annotated:
    """Read the submitted answers of a record.

    Raises:
        MalformedError: an answer is not of its question's form, or names a response that is not there.

    """
    (record,) = records
    fields = fields_of(records)
    responses = read_responses(fields, layout)
    found = Annotated(fields.get(layout.prompt), responses, read_models(_metadata(record), layout, list(responses)))
    known = all_names(layout, responses)
    kept: dict[str, str | None] = {}
    refused: dict[str, str] = {}
    for given in _answers(record):
        found.questions |= {given.question} if given.question else set[str]()
        if isinstance(given.status, str) and given.status in _LEFT_OUT:
            refused[given.user] = given.status
        elif given.status not in (None, "submitted"):
            raise MalformedError(given.where, f"has the status {given.status!r}, not submitted, draft or discarded")
        elif given.value is not None and (not wanted.questions or given.question in wanted.questions):
            kept[given.user] = given.status
            _take(found, given, known)
    found.left_out.update(_LEFT_OUT[status] for status in refused.values())
    found.unknown_status = sum(status is None for status in kept.values())
    return found


def _metadata(record: Record) -> Record:
    if "fields" in record:
        metadata = record.get("metadata")
        return metadata if isinstance(metadata, Mapping) else {}
    return {key.removeprefix(_METADATA): value for key, value in record.items()}


def _answers(record: Record) -> Iterator[_Given]:
    if "fields" not in record:
        return _flat_answers(record)
    match record.get("responses"):
        case None:
            return iter(())
        case Mapping() as by_question:
            return _answers_by_question(by_question)
        case list() as by_user:
            return _answers_by_user(by_user)
        case _:
            raise MalformedError("responses", "must be an object by question, or a list with one object a user")


def _answers_by_user(responses: list[Any]) -> Iterator[_Given]:
    nameless = Counter[str]()
    for number, response in enumerate(responses):
        where = f"responses[{number}]"
        if not isinstance(response, Mapping) or "status" not in response:
            raise MalformedError(where, "must be an object with user_id, status and values")
        user = _user(response.get("user_id"), nameless, "")
        values = response.get("values") or {}
        if not isinstance(values, Mapping):
            raise MalformedError(f"{where}.values", "must be an object by question")
        if not values:
            yield _Given(user, response["status"], "", None, where)
        for question, answer in values.items():
            if not isinstance(answer, Mapping) or "value" not in answer:
                raise MalformedError(f"{where}.values.{question}", "must be an object with a value")
            at = f"{where}.values.{question}.value"
            yield _Given(user, response["status"], question, answer["value"], at)


def _answers_by_question(responses: Record) -> Iterator[_Given]:
    nameless = Counter[str]()
    for question, answers in responses.items():
        if not isinstance(answers, list):
            raise MalformedError(f"responses.{question}", "must be a list of answers")
        for number, answer in enumerate(answers):
            where = f"responses.{question}[{number}]"
            if not isinstance(answer, Mapping) or "value" not in answer:
                raise MalformedError(where, "must be an object with value and user_id")
            user = _user(answer.get("user_id"), nameless, question)
            yield _Given(user, answer.get("status"), question, answer["value"], f"{where}.value")


def _flat_answers(record: Record) -> Iterator[_Given]:
    nameless = Counter[str]()
    for key in record:
        if not key.endswith(ANSWERS):
            continue
        question = key.removesuffix(ANSWERS)
        values, users = record[key] or [], record.get(question + USERS) or []
        statuses = record.get(question + STATUSES) or [None] * len(values)
        if not all(isinstance(column, list) for column in (values, users, statuses)):
            raise MalformedError(key, "and its users and status must be lists")
        if not len(values) == len(users) == len(statuses):
            raise MalformedError(key, f"has {len(values)} answers of {len(users)} users with {len(statuses)} statuses")
        for number, (value, user, status) in enumerate(zip(values, users, statuses, strict=True)):
            yield _Given(_user(user, nameless, question), status, question, value, f"{key}[{number}]")


def _user(identifier: Any, nameless: Counter[str], question: str) -> str:
    """Name a user as the export does. Of users who were deleted only the answers are left: they are numbered."""
    if identifier not in (None, "None"):
        return str(identifier)
    nameless[question] += 1
    return f"deleted user {nameless[question]}"


def _take(found: Annotated, given: _Given, known: Sequence[str]) -> None:
    """Add an answer that compares responses; count one that does not. ``known`` has the null responses' names too."""
    names = list(found.responses)
    user, question, value = given.user, given.question, given.value
    if isinstance(value, str):
        places = preference(value, names)
    elif is_number(value):
        name = mentioned(question, known)
        if name is not None and name in found.responses:
            found.said.append(Rated(user, question, name, value))
            return
        places = None
    elif isinstance(value, list) and any(
        isinstance(one, Mapping) and ("value" in one or "rank" in one) for one in value
    ):
        places = _places(value, known, names, given.where)
    else:
        if _is_bare_ranking(value, known):
            raise MalformedError(
                given.where,
                "is a ranking without ranks: Argilla's SDK leaves them out; export with the server "
                "(/api/v1/datasets/ID/records?include=responses, or to the hub from its page)",
            )
        places = None
    if places is None:
        found.left_out[f"answers to {question}, which compare no responses"] += 1
    else:
        found.said.append(Ranked(user, question, places))


def _is_bare_ranking(value: Any, known: Sequence[str]) -> bool:
    """Whether a list names responses only: the labels of a question about something else would not."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        return False
    return all(meant(one, known, ranked=True) for one in value)


def _places(value: list[Any], known: Sequence[str], names: list[str], where: str) -> list[list[str]]:
    by_rank: dict[float, list[str]] = {}
    for number, one in enumerate(value):
        at = f"{where}[{number}]"
        if not isinstance(one, Mapping) or not isinstance(option := one.get("value"), str):
            raise MalformedError(f"{at}.value", "must be the name of an option")
        rank = one.get("rank")
        if not is_number(rank) or rank != rank:  # NaN alone differs from itself
            raise MalformedError(f"{at}.rank", "is missing" if rank is None else f"is {rank!r}, and must be a number")
        name = meant(option, known, ranked=True)
        if name is None:
            raise MalformedError(f"{at}.value", f"names {option!r}, and the responses are {', '.join(known)}")
        if any(name in place for place in by_rank.values()):
            raise MalformedError(f"{at}.value", f"names response {name} twice")
        by_rank.setdefault(rank, []).append(name)
    ordered = [[name for name in by_rank[rank] if name in names] for rank in sorted(by_rank)]
    return [place for place in ordered if place]
