"""Samples are written in Argilla 2's forms: records of its API v1, the server's hub export, and exports of SDK 2.4."""

from collections import Counter
from typing import Any

import pytest

from rlhf.data.annotations import Wanted, find_layout
from rlhf.data.argilla import fields_of, read, recognises
from rlhf.data.records import MalformedError

ANN, BOB, CY = (f"{number}0e8a1c2-57ab-4f0c-9a41-3f3c5d2b7a10" for number in (1, 2, 3))
FIELDS = {"prompt": "Name a colour.", "response-1": "Blue.", "response-2": "Red.", "response-3": "Seven."}


def ranking(**ranks: int | None) -> list[dict[str, Any]]:
    """As the server keeps it: in the order of the options, whatever the ranks."""
    return [{"value": f"reply-{name[1:]}", "rank": rank} for name, rank in ranks.items()]


def response(user: str | None, status: str, **values: Any) -> dict[str, Any]:
    return {
        "id": "5e0c8f6e-4a0a-4f0a-8f3f-6f3c5d2b7a10",
        "values": {question: {"value": value} for question, value in values.items()} or None,
        "status": status,
        "record_id": "9b2c8f6e-4a0a-4f0a-8f3f-6f3c5d2b7a10",
        "user_id": user,
        "inserted_at": "2025-03-04T10:11:12.131415",
        "updated_at": "2025-03-04T10:11:12.131415",
    }


def server_record(*responses: dict[str, Any], fields: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """``GET /api/v1/datasets/ID/records?include=responses``, one of ``items``."""
    return {
        "id": "9b2c8f6e-4a0a-4f0a-8f3f-6f3c5d2b7a10",
        "status": "completed",
        "fields": fields or FIELDS,
        "metadata": {"topic": "colours"},
        "external_id": "17",
        "responses": list(responses),
        "dataset_id": "77aa8f6e-4a0a-4f0a-8f3f-6f3c5d2b7a10",
        "inserted_at": "2025-03-04T10:00:00",
        "updated_at": "2025-03-04T10:00:00",
    } | more


def sdk_record(responses: dict[str, Any], fields: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """``dataset.records.to_json``: answers by question, without their status."""
    return {
        "id": "17",
        "fields": fields or FIELDS,
        "metadata": {},
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "_server_id": "9b2c8f6e-4a0a-4f0a-8f3f-6f3c5d2b7a10",
    } | more


def flat_record(fields: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    """The server's export to the hub, and ``to_datasets``; ``__`` is a dot."""
    return {
        "id": "17",
        "status": "completed",
        "inserted_at": "2025-03-04T10:00:00",
        "updated_at": "2025-03-04T10:00:00",
        "_server_id": "9b2c8f6e-4a0a-4f0a-8f3f-6f3c5d2b7a10",
        **(fields or FIELDS),
        **{name.replace("__", "."): value for name, value in columns.items()},
    }


def read_one(record: dict[str, Any], wanted: Wanted | None = None) -> Any:
    assert recognises(record)
    wanted = wanted or Wanted()
    return read([record], find_layout(fields_of([record]), wanted), wanted)


def reason(record: dict[str, Any], wanted: Wanted | None = None) -> str:
    with pytest.raises(MalformedError) as caught:
        read_one(record, wanted).as_row()
    return str(caught.value.reason)


def test_rankings_go_by_their_ranks_with_ties_and_omissions() -> None:
    """The order in which options are listed says nothing."""
    found = read_one(
        server_record(
            response(ANN, "submitted", preference=ranking(r1=3, r2=1, r3=2)),
            response(BOB, "submitted", preference=ranking(r1=2, r2=1, r3=1)),
            response(CY, "submitted", preference=ranking(r3=2, r1=1)),
        )
    )
    assert found.as_row() == {
        "prompt": "Name a colour.",
        "responses": ["Blue.", "Red.", "Seven."],
        "rankings": [[1, 2, 0], [[1, 2], 0], [0, 2]],
        "annotators": [ANN, BOB, CY],
    }
    assert not found.left_out
    assert not found.unknown_status


def test_a_response_that_is_null_is_in_no_ranking() -> None:
    """Fields may be optional, and the annotator had to rank all options all the same."""
    given = response(ANN, "submitted", preference=ranking(r1=3, r2=1, r3=2))
    row = read_one(server_record(given, fields=FIELDS | {"response-2": None})).as_row()
    assert (row["responses"], row["rankings"]) == (["Blue.", "Seven."], [[1, 0]])


def test_only_submitted_responses_count() -> None:
    """Drafts and discarded ones are counted, once a person, also where they answer nothing."""
    found = read_one(
        server_record(
            response(ANN, "draft", preference=ranking(r1=3, r2=None, r3=2), comment="half"),
            response(BOB, "discarded"),
            response(CY, "submitted", preference=ranking(r1=1, r2=2, r3=3)),
        )
    )
    assert found.as_row()["annotators"] == [CY]
    assert found.left_out == Counter({"draft responses": 1, "discarded responses": 1})


def test_the_hub_export_reads_as_the_servers_records() -> None:
    """The same answers in columns, with statuses."""
    values = [ranking(r1=3, r2=1, r3=2), ranking(r1=1, r2=1, r3=2), None]
    flat = flat_record(
        preference__responses=values,
        preference__responses__users=[ANN, BOB, CY],
        preference__responses__status=["submitted", "draft", "discarded"],
        preference__suggestion=None,
        metadata__topic=["colours"],
    )
    nested = server_record(
        response(ANN, "submitted", preference=values[0]),
        response(BOB, "draft", preference=values[1]),
        response(CY, "discarded"),
    )
    assert read_one(flat).as_row() == read_one(nested).as_row()
    assert read_one(flat).left_out == read_one(nested).left_out


def test_a_rating_belongs_to_the_response_its_question_names() -> None:
    """As distilabel asks, a question a generation; what nobody rated is null, and other questions are counted."""
    fields = {"id": "8f", "instruction": "p", "generations-0": "a", "generations-1": "b", "generations-2": None}
    found = read_one(
        sdk_record(
            {
                "generations-0-rating": [{"value": 4, "user_id": ANN}, {"value": 2, "user_id": BOB}],
                "generations-1-rating": [{"value": 5, "user_id": BOB}],
                "generations-2-rating": [{"value": 1, "user_id": BOB}],
                "generations-0-rationale": [{"value": "Better than both.", "user_id": BOB}],
                "difficulty": [{"value": 3, "user_id": BOB}],
            },
            fields=fields,
        )
    )
    assert found.as_row() == {
        "prompt": "p",
        "responses": ["a", "b"],
        "ratings": [[4, 2], [None, 5]],
        "annotators": [ANN, BOB],
    }
    assert found.left_out == {
        f"answers to {question}, which compare no responses": 1
        for question in ("generations-2-rating", "generations-0-rationale", "difficulty")
    }


def test_answers_without_a_status_are_taken_and_counted() -> None:
    """The SDK's JSON does not say who submitted."""
    found = read_one(sdk_record({"response-1-rating": [{"value": 4, "user_id": ANN}, {"value": 2, "user_id": BOB}]}))
    assert found.unknown_status == 2
    assert not found.compares


def test_a_label_between_two_responses_is_a_ranking_of_two() -> None:
    """A tie too; a label that means neither is counted."""
    fields = {"prompt": "p", "response_a": "a", "response_b": "b"}
    users = [f"user {number}" for number in range(5)]
    labels = ["response_a", "B", "Tie", "unsure", "level 1"]
    answers = [{"value": label, "user_id": user} for label, user in zip(labels, users, strict=True)]
    found = read_one(sdk_record({"choice": answers}, fields=fields))
    assert found.as_row()["rankings"] == [[0, 1], [1, 0], [[0, 1]]]
    assert found.as_row()["annotators"] == users[:3]
    assert found.left_out == {"answers to choice, which compare no responses": 2}


def test_a_label_that_picks_one_of_three_compares_nothing() -> None:
    """It would not say how the other two compare, nor that they are tied."""
    found = read_one(sdk_record({"best": [{"value": "response-1", "user_id": ANN}]}))
    assert not found.answers
    assert found.left_out.total() == 1


def test_labels_about_something_else_are_no_bare_ranking() -> None:
    """A list of labels, spans and texts are counted and stop nothing."""
    found = read_one(
        sdk_record(
            {
                "flags": [{"value": ["violent", "wrong"], "user_id": ANN}],
                "spans": [{"value": [{"start": 0, "end": 2, "label": "x"}], "user_id": ANN}],
                "correct": [{"value": True, "user_id": ANN}],
            }
        )
    )
    assert found.left_out.total() == 3


def test_rankings_and_ratings_share_their_annotators() -> None:
    """Who only rated has an empty ranking, who only ranked a column of nulls."""
    found = read_one(
        server_record(
            response(ANN, "submitted", preference=ranking(r1=1, r2=2, r3=3)),
            response(BOB, "submitted", **{"response-1-rating": 4, "response-3-rating": 2}),
        )
    )
    row = found.as_row()
    assert row["rankings"] == [[0, 1, 2], []]
    assert row["ratings"] == [[None, 4], [None, None], [None, 2]]


def test_deleted_users_are_numbered() -> None:
    """Argilla keeps their responses without their identifier, or as the text None."""
    first = response(None, "submitted", preference=ranking(r1=1, r2=2, r3=3))
    second = response("None", "submitted", preference=ranking(r1=1, r2=2, r3=3))
    assert read_one(server_record(first, second)).as_row()["annotators"] == ["deleted user 1", "deleted user 2"]


def test_metadata_names_the_models() -> None:
    """In the hub's export terms are lists."""
    given = response(ANN, "submitted", preference=ranking(r1=1, r2=2, r3=3))
    models = {"model_1": "x", "model_2": "y", "model_3": "x"}
    assert read_one(server_record(given, metadata=models)).as_row()["models"] == ["x", "y", "x"]
    columns: dict[str, Any] = {f"metadata__{name}": [value] for name, value in models.items()}
    assert read_one(flat_record(**columns, preference__responses=None)).models == ["x", "y", "x"]


def test_a_chat_is_a_prompt() -> None:
    """Argilla's ChatField holds messages."""
    chat = [{"role": "user", "content": "Hello"}]
    found = read_one(server_record(fields={"conversation": chat, "r1": "a", "r2": "b"}))
    assert found.prompt == chat


def test_one_question_of_several_is_taken_when_asked_for() -> None:
    """Two rankings by one person cannot both be the person's ranking."""
    both = server_record(
        response(ANN, "submitted", helpful=ranking(r1=1, r2=2, r3=3), harmless=ranking(r1=3, r2=2, r3=1))
    )
    problem = f"annotator {ANN} ranks the responses in helpful and in harmless; say with --question which to take"
    assert reason(both) == problem
    assert read_one(both, Wanted(questions=("harmless",))).as_row()["rankings"] == [[2, 1, 0]]


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            server_record(response(ANN, "submitted", preference=[{"value": "reply-4", "rank": 1}])),
            "responses[0].values.preference.value[0].value: names 'reply-4', and the responses are "
            "response-1, response-2, response-3",
        ),
        (
            server_record(response(ANN, "submitted", preference=ranking(r1=1, r2=None))),
            "responses[0].values.preference.value[1].rank: is missing",
        ),
        (
            server_record(response(ANN, "submitted", preference=[{"value": "reply-1"}])),
            "responses[0].values.preference.value[0].rank: is missing",
        ),
        (
            server_record(response(ANN, "submitted", preference=[{"rank": 1}])),
            "responses[0].values.preference.value[0].value: must be the name of an option",
        ),
        (
            server_record(response(ANN, "submitted", preference=[{"value": "reply-1", "rank": "1"}])),
            "responses[0].values.preference.value[0].rank: is '1', and must be a number",
        ),
        (
            server_record(response(ANN, "submitted", preference=[*ranking(r1=1), {"value": "response-1", "rank": 2}])),
            "responses[0].values.preference.value[1].value: names response response-1 twice",
        ),
        (
            server_record(response(ANN, "approved", preference=ranking(r1=1))),
            "responses[0].values.preference.value: has the status 'approved', not submitted, draft or discarded",
        ),
        (server_record({"user_id": ANN}), "responses[0]: must be an object with user_id, status and values"),
        (
            server_record(response(ANN, "submitted") | {"values": {"preference": 3}}),
            "responses[0].values.preference: must be an object with a value",
        ),
        (
            server_record(response(ANN, "submitted") | {"values": [3]}),
            "responses[0].values: must be an object by question",
        ),
        (sdk_record({"preference": {"value": 3}}), "responses.preference: must be a list of answers"),
        (sdk_record({"preference": [3]}), "responses.preference[0]: must be an object with value and user_id"),
        (
            sdk_record({}) | {"responses": "none"},
            "responses: must be an object by question, or a list with one object for each user",
        ),
        (
            flat_record(preference__responses=[3, 4], preference__responses__users=[ANN]),
            "preference.responses: has 2 answers of 1 users with 2 statuses",
        ),
        (flat_record(preference__responses="3"), "preference.responses: and its users and status must be lists"),
        (
            sdk_record({"response-1-rating": [{"value": 4, "user_id": ANN}, {"value": 5, "user_id": ANN}]}),
            f"annotator {ANN} rates response-1 twice; say with --question which to take",
        ),
    ],
)
def test_what_argilla_does_not_write_is_refused_with_its_place(record: dict[str, Any], problem: str) -> None:
    """One reason, in the export's own words."""
    assert reason(record) == problem


@pytest.mark.parametrize("options", [["reply-1", "reply-2", "reply-3"], ["1", "2", "3"], ["response-2"]])
def test_a_ranking_without_ranks_is_refused(options: list[str]) -> None:
    """The SDK writes it in the order of the settings (argilla-io/argilla, issues 5677 and 5712)."""
    problem = reason(sdk_record({"preference": [{"value": options, "user_id": ANN}]}))
    assert problem.startswith("responses.preference[0].value: is a ranking without ranks")
    assert "/api/v1/datasets/ID/records?include=responses" in problem


def test_fields_must_be_an_object() -> None:
    """The record is named, not a trace."""
    with pytest.raises(MalformedError, match="must be an object"):
        fields_of([sdk_record({}, fields={"a": 1}) | {"fields": ["a"]}])
