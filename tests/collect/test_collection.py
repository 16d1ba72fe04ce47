import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.collect.annotation import shown_order
from rlhf.collect.collection import Collection, StaleAnswerError, read_sets
from rlhf.data.records import ComparisonSet, parse_record
from rlhf.errors import RecordError, RequestError
from tests.collect.program import read_lines, write_rows

ROWS = [
    {"prompt": "p0", "responses": ["a", "b", "c"], "models": ["x", "y", "z"]},
    {"prompt": [{"role": "user", "content": "p1"}], "responses": ["a", "b"]},
]


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "sets.jsonl", ROWS)


def best_first(collection: Collection, annotator: str, row: str, indices: list[int]) -> list[Any]:
    """The positions on the annotator's page of these responses."""
    shown = shown_order(annotator, row, len(indices))
    return [shown.index(index) for index in indices]


def test_rows_of_every_kind_are_read_once_without_what_was_said_of_them(tmp_path: Path):
    """Responses alone, comparison sets and pairs; the same prompt and responses again are the same row."""
    compared = {"prompt": "p2", "responses": ["a", "b"], "ratings": [[1], [2]], "annotators": ["x"]}
    pair = {"prompt": "p3", "chosen": "a", "rejected": "b", "margin": 1.0}
    path = write_rows(tmp_path / "sets.jsonl", [*ROWS, compared, pair, ROWS[0] | {"models": ["u", "v", "w"]}])
    found = [one.model_dump(exclude_none=True) for one in read_sets(str(path)).values()]
    assert found == [
        *ROWS,
        {"prompt": "p2", "responses": ["a", "b"]},
        {"prompt": "p3", "responses": ["a", "b"]},
    ]


def test_bad_rows_are_named_by_file_line_and_field_before_anything_is_made(tmp_path: Path):
    """All of them; no journal appears."""
    rows = [ROWS[0], {"prompt": "p", "responses": ["one"]}, {"prompt": "p", "responses": ["a", "b"], "model": ["m"]}]
    path = write_rows(tmp_path / "sets.jsonl", rows)
    path.write_text(path.read_text() + "{half\n")
    with pytest.raises(RecordError) as caught:
        Collection(str(path), tmp_path / "out.jsonl")
    where = caught.value.where.splitlines()
    assert caught.value.what == "3 of 4 rows are malformed"
    assert where[0].startswith(f"{path}:2: responses: list should have at least 2 items")
    assert f"{path}:3: model: is unknown; did you mean models?" in where[1]
    assert f"{path}:4: invalid JSON" in where[2]
    assert [one.name for one in tmp_path.iterdir()] == ["sets.jsonl"]
    with pytest.raises(RecordError, match="no rows"):
        read_sets(str(write_rows(tmp_path / "none.jsonl", [])))


def test_the_result_is_comparison_sets_with_a_ranking_of_each_annotator(sets: Path, tmp_path: Path):
    """By the responses' indices in the file, with the models that the page never showed; skipped rows are left out."""
    out = tmp_path / "out.jsonl"
    with Collection(str(sets), out) as collection:
        three, two = collection.annotation.sets
        collection.answer("bob", three, best_first(collection, "bob", three, [2, 0, 1]), 0)
        collection.answer("ann", three, best_first(collection, "ann", three, [0, 2, 1]), 0)
        collection.answer("ann", two, None, 0)
        assert collection.export() == (1, 2, 2)
    assert read_lines(out) == [ROWS[0] | {"rankings": [[0, 2, 1], [2, 0, 1]], "annotators": ["ann", "bob"]}]
    assert all(isinstance(parse_record(row, ComparisonSet), ComparisonSet) for row in read_lines(out))
    with Collection(str(sets), out) as collection:
        assert collection.annotation.progress("ann") == (1, 1, 0)
        assert collection.export() == (1, 2, 2)


def test_the_same_answer_again_is_one_and_an_answer_to_an_old_page_is_refused(sets: Path, tmp_path: Path):
    """An acknowledgement may be lost and the answer sent again; a window left open must not undo what came later."""
    with Collection(str(sets), tmp_path / "out.jsonl") as collection:
        row = next(iter(collection.annotation.sets))
        assert collection.answer("ann", row, [0, 1, 2], 0).sequence == 1
        assert collection.answer("ann", row, [0, 1, 2], 0).sequence == 1
        assert collection.answer("ann", row, [[2, 1], 0], 1).sequence == 2
        assert collection.answer("ann", row, [[1, 2], 0], 2).sequence == 2
        with pytest.raises(StaleAnswerError):
            collection.answer("ann", row, [2, 1, 0], 1)
        assert collection.answer("bob", row, [2, 1, 0], 0).sequence == 3
    assert len(read_lines(tmp_path / "out.answers.jsonl")) == 3


def test_a_file_that_was_not_made_here_is_refused_and_left_alone(sets: Path, tmp_path: Path):
    """Also the file of rows itself, and a name that is no file of records."""
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    for path in (out, sets):
        before = path.read_text()
        with pytest.raises(RequestError, match="was not made by rlhf annotate"):
            Collection(str(sets), path)
        assert path.read_text() == before
    with pytest.raises(RequestError, match=r"must end in \.jsonl"):
        Collection(str(sets), tmp_path / "out.json")
    with pytest.raises(RequestError, match="there are no answers"):
        Collection(str(sets), tmp_path / "new.jsonl", create=False)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.jsonl", "sets.jsonl"]


def test_answers_follow_their_rows_and_those_of_rows_that_are_gone_are_told(sets: Path, tmp_path: Path):
    """Rows may move, come and go: content decides; with other rows altogether one is told before OUT is touched."""
    out = tmp_path / "out.jsonl"
    with Collection(str(sets), out) as collection:
        for row, indices in zip(collection.annotation.sets, ([0, 1, 2], [1, 0]), strict=True):
            collection.answer("ann", row, best_first(collection, "ann", row, indices), 0)
        collection.export()
    before = out.read_text()
    new: dict[str, Any] = {"prompt": "new", "responses": ["a", "b"]}
    with Collection(str(write_rows(tmp_path / "more.jsonl", [new, *ROWS[::-1]])), out) as collection:
        assert collection.notices == []
        assert collection.annotation.progress("ann") == (2, 0, 1)
    with Collection(str(write_rows(tmp_path / "less.jsonl", ROWS[1:])), out) as collection:
        assert len(collection.notices) == 1
        assert "1 answered row not in" in collection.notices[0]
        assert [one.rankings for one in collection.annotation.comparison_sets()] == [[[1, 0]]]
    with pytest.raises(RequestError, match="given to other rows"):
        Collection(str(write_rows(tmp_path / "other.jsonl", [new])), out)
    assert out.read_text() == before


def test_an_answer_that_does_not_fit_its_row_is_damage(sets: Path, tmp_path: Path):
    """A journal edited by hand is named by file and line, and let go again."""
    out, row = tmp_path / "out.jsonl", next(iter(read_sets(str(sets))))
    answer = {"sequence": 1, "row": row, "annotator": "ann", "ranking": [0, 1], "skipped": False}
    write_rows(tmp_path / "out.answers.jsonl", [answer])
    for _ in range(2):
        with pytest.raises(RecordError, match="each of the 3 responses once") as caught:
            Collection(str(sets), out)
        assert caught.value.where == f"{tmp_path / 'out.answers.jsonl'}:1"
    assert json.loads((tmp_path / "out.answers.jsonl").read_text()) == answer
