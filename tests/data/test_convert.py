"""Whole files through the conversion. Their records are in the forms that the tests of each tool tell of."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.annotations import Wanted
from rlhf.data.convert import Converted, convert_file
from rlhf.data.readers import NAMED_BAD_ROWS
from rlhf.data.records import read_rows
from rlhf.data.validation import validate_file
from rlhf.errors import RecordError, RequestError, RlhfError
from tests.data.test_argilla import flat_record, ranking, response, sdk_record, server_record
from tests.data.test_label_studio import ITEMS, PAIR, annotation, flat, pairwise, ranker, task

ARGILLA = server_record(
    response("ann", "submitted", preference=ranking(r1=3, r2=1, r3=1)),
    response("bob", "draft", preference=ranking(r1=1, r2=2, r3=3)),
)


def write(path: Path, records: Any) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def convert(path: Path, records: Any, tool: str | None = None, wanted: Wanted | None = None) -> Converted:
    return convert_file(write(path / "export.json", records), path / "out.jsonl", tool, wanted or Wanted())


def refused(path: Path, records: Any, tool: str | None = None, wanted: Wanted | None = None) -> RlhfError:
    with pytest.raises(RlhfError) as caught:
        convert(path, records, tool, wanted)
    assert sorted(file.name for file in path.iterdir()) == ["export.json"], "nothing is written"
    return caught.value


@pytest.mark.parametrize("tool", [None, "argilla"])
def test_an_export_of_argilla_becomes_comparison_sets(tmp_path: Path, tool: str | None) -> None:
    """What is written is what the pipeline reads, and what is left out is counted."""
    found = convert(tmp_path, [ARGILLA, server_record(), ARGILLA], tool)
    left_out = {"draft responses": 2, "records without a comparison": 1}
    assert found == Converted(records=3, sets=2, annotators=1, unknown_status=0, left_out=found.left_out)
    assert found.left_out == left_out
    row = {
        "prompt": "Name a colour.",
        "responses": ["Blue.", "Red.", "Seven."],
        "rankings": [[[1, 2], 0]],
        "annotators": ["ann"],
    }
    assert read_rows(tmp_path / "out.jsonl") == [row, row]
    assert validate_file(str(tmp_path / "out.jsonl"), None) == ("comparisons", 2, "")


@pytest.mark.parametrize("tool", [None, "label-studio"])
def test_an_export_of_label_studio_becomes_comparison_sets(tmp_path: Path, tool: str | None) -> None:
    """Several people and tags in one file."""
    found = convert(
        tmp_path,
        [
            task(PAIR, annotation(1, pairwise("left")), annotation(2, pairwise("right"), was_cancelled=True)),
            task(PAIR | {"prompt": "Another."}, annotation(2, pairwise("right"))),
        ],
        tool,
    )
    assert (found.records, found.sets, found.annotators) == (2, 2, 2)
    assert found.left_out == {"cancelled annotations": 1}
    assert [row["rankings"] for row in read_rows(tmp_path / "out.jsonl")] == [[[0, 1]], [[1, 0]]]


def test_the_annotations_of_one_task_make_one_set_out_of_json_min(tmp_path: Path) -> None:
    """They follow one another; another task begins a set of its own."""
    rows = [
        flat(PAIR, 1, comparison=[{"selected": "left"}]),
        flat(PAIR, 2, comparison=[{"selected": "right"}]),
        flat(PAIR, 2, comparison=[{"selected": "right"}]) | {"id": 401636},
    ]
    found = convert(tmp_path, rows)
    assert (found.records, found.sets, found.annotators) == (3, 2, 2)
    assert [row["annotators"] for row in read_rows(tmp_path / "out.jsonl")] == [["1", "2"], ["2"]]


def test_parquet_reads_as_json(tmp_path: Path) -> None:
    """The hub's export is Parquet: structs and absent columns come out the same."""
    records = [
        flat_record(
            preference__responses=[ranking(r1=2, r2=1, r3=1)],
            preference__responses__users=["ann"],
            preference__responses__status=["submitted"],
        ),
        flat_record(preference__responses=None, preference__responses__users=None, preference__responses__status=None),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "export.parquet")
    found = convert_file(str(tmp_path / "export.parquet"), tmp_path / "parquet.jsonl", None, Wanted())
    assert found == convert(tmp_path, records)
    assert (tmp_path / "parquet.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()


def test_a_response_field_that_only_later_records_have_is_a_response(tmp_path: Path) -> None:
    """Argilla leaves optional fields out of the records that lack them."""
    fields = {"prompt": "p", "r1": "a", "r2": "b"}
    given = response("ann", "submitted", preference=ranking(r1=1, r2=2))
    more = response("ann", "submitted", preference=ranking(r3=1, r1=2, r2=3))
    convert(tmp_path, [server_record(given, fields=fields), server_record(more, fields=fields | {"r3": "c"})])
    assert [row["rankings"] for row in read_rows(tmp_path / "out.jsonl")] == [[[0, 1]], [[2, 0, 1]]]


def test_answers_of_unknown_status_are_counted(tmp_path: Path) -> None:
    """The SDK's JSON does not tell drafts from what was submitted."""
    ratings = {f"response-{one}-rating": [{"value": one, "user_id": "ann"}] for one in (1, 2)}
    assert convert(tmp_path, [sdk_record(ratings), sdk_record({})]).unknown_status == 1


def test_a_record_of_one_response_is_left_out(tmp_path: Path) -> None:
    """There is nothing to compare in it, and nothing wrong with it."""
    lone = ITEMS | {"items": ITEMS["items"][:1]}
    both = [task(lone, annotation(1, ranker(["llm_1"]))), task(ITEMS, annotation(1, ranker(["llm_2", "llm_1"])))]
    assert convert(tmp_path, both).left_out == {"records with fewer than two responses": 1}


def test_malformed_records_are_all_named_by_number_and_field(tmp_path: Path) -> None:
    """The line says little where a tool writes its array on one line."""
    records = [
        ARGILLA,
        server_record(response("ann", "submitted", preference=[{"value": "reply-9", "rank": 1}])),
        [1],
        server_record(*ARGILLA["responses"], fields={"prompt": " ", **{f"response-{one}": "a" for one in (1, 2, 3)}}),
        server_record(
            *ARGILLA["responses"], fields={"prompt": "p", "response-1": "a", "response-2": 2, "response-3": "c"}
        ),
    ]
    error = refused(tmp_path, records)
    assert isinstance(error, RecordError)
    assert error.what == "4 of 5 records are malformed, and nothing is written"
    place = f"{tmp_path}/export.json:1, record"
    assert error.where.splitlines() == [
        f"{place} 2: responses[0].values.preference.value[0].value: names 'reply-9', and the responses are "
        "response-1, response-2, response-3",
        f"  {place} 3: a record must be an object with fields, not list",
        f"  {place} 4: prompt: is empty",
        f"  {place} 5: response-2: input should be a valid string",
    ]


def test_many_malformed_records_are_counted_and_some_named(tmp_path: Path) -> None:
    """The message stays short."""
    bad = server_record(response("ann", "approved", preference=[]))
    error = refused(tmp_path, [bad] * (NAMED_BAD_ROWS + 3))
    assert error.where.endswith("and 3 more")


def test_bytes_that_are_not_utf8_are_a_malformed_record(tmp_path: Path) -> None:
    """In an array they reach the field, in lines the row is not read at all."""
    line = json.dumps(ARGILLA).replace("Red.", "R\xe9d.").encode("latin-1")
    for name, content, problem in (
        ("array.json", b"[" + line + b"]", "record 1: response-2: holds bytes that are not UTF-8"),
        ("lines.jsonl", line + b"\n", "record 1: byte 0xe9 at position"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordError) as caught:
            convert_file(str(tmp_path / name), tmp_path / "out.jsonl", "argilla", Wanted())
        assert problem in caught.value.where
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([], "there are no records"),
        ([server_record(), server_record()], "no record of 2 compares responses: 2 records without a comparison"),
        ([task(PAIR)], "no record of 1 compares responses: 1 records without a comparison"),
        ([task(PAIR, annotation(1, pairwise("left"), was_cancelled=True))], "1 cancelled annotations"),
        (
            [{"prompt": "p", "chosen": "a"}],
            "no known tool or data set writes such records; their fields are prompt, chosen",
        ),
        ([{}], "their fields are none"),
        ([server_record(fields={"text": "p", "good": "a"})], "the responses' fields are not clear"),
    ],
)
def test_a_file_without_comparisons_is_refused(tmp_path: Path, records: Any, what: str) -> None:
    """Nobody should find an empty file where data was expected."""
    error = refused(tmp_path, records)
    assert isinstance(error, RecordError)
    assert what in error.what


@pytest.mark.parametrize("tool", ["argilla", "label-studio"])
def test_another_tools_file_is_refused(tmp_path: Path, tool: str) -> None:
    """What --from says is believed, and then the records do not fit."""
    records = [task(PAIR, annotation(1, pairwise("left")))] if tool == "argilla" else [ARGILLA]
    assert isinstance(refused(tmp_path, records, tool), RecordError)


@pytest.mark.parametrize(
    ("wanted", "what", "next_step"),
    [
        (Wanted(questions=("preferences",)), "no annotator answered 'preferences'", "did you mean preference?"),
        (Wanted(prompt="promt"), "there is no field 'promt'", "did you mean prompt?"),
        (
            Wanted(responses=("response-1", "response-4")),
            "there is no field 'response-4'",
            "known: prompt, response-1, response-2, response-3",
        ),
    ],
)
def test_a_field_or_question_that_is_nowhere_is_a_mistake(
    tmp_path: Path, wanted: Wanted, what: str, next_step: str
) -> None:
    """With the names there are."""
    error = refused(tmp_path, [ARGILLA], wanted=wanted)
    assert isinstance(error, RequestError)
    assert error.what == what
    assert next_step in error.next_step


def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    """Nor is a folder made."""
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(RequestError, match="would be lost"):
        convert(tmp_path, [ARGILLA])
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(RequestError, match="no such folder"):
        convert_file(str(tmp_path / "export.json"), tmp_path / "none" / "out.jsonl", None, Wanted())
