from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.collect.annotation import (
    LONGEST_NAME,
    Annotation,
    Answer,
    Ranking,
    clean_name,
    renamed,
    shown_order,
)
from rlhf.data.records import ComparisonSet, ResponseSet, parse_record

COUNTS = {"r0": 2, "r1": 3, "r2": 5}


def annotation() -> Annotation:
    return Annotation(
        {
            row: ResponseSet(prompt=row, responses=[f"{row}-{one}" for one in range(count)], models=["m"] * count)
            for row, count in COUNTS.items()
        }
    )


@st.composite
def rankings(draw: st.DrawFn, count: int) -> Ranking:
    """Any order of the responses, any neighbours tied."""
    order = draw(st.permutations(range(count)))
    places: list[list[int]] = [[order[0]]]
    for index in order[1:]:
        if draw(st.booleans()):
            places[-1].append(index)
        else:
            places.append([index])
    return [sorted(place) if len(place) > 1 else place[0] for place in places]


@st.composite
def histories(draw: st.DrawFn) -> list[Answer]:
    found: list[Answer] = []
    for sequence in range(1, draw(st.integers(0, 12)) + 1):
        row = draw(st.sampled_from(sorted(COUNTS)))
        ranking = draw(st.none() | rankings(COUNTS[row]))
        name = draw(st.sampled_from(["ann", "bob"]))
        found.append(Answer(sequence=sequence, row=row, annotator=name, ranking=ranking, skipped=ranking is None))
    return found


@given(histories())
def test_the_sets_are_everybodys_newest_rankings_whatever_came_before(history: list[Answer]):
    """Against a plain dictionary; and each set is a record that the pipeline reads."""
    collected = annotation()
    newest: dict[tuple[str, str], Answer] = {}
    for answer in history:
        collected.add(answer)
        newest[answer.row, answer.annotator] = answer
    sets = {str(one.prompt): one for one in collected.comparison_sets()}
    for row in COUNTS:
        expected = {
            name: newest[row, name].ranking
            for name in ("ann", "bob")
            if (row, name) in newest and not newest[row, name].skipped
        }
        assert (row in sets) == bool(expected)
        if expected:
            assert dict(zip(sets[row].annotators or [], sets[row].rankings or [], strict=True)) == expected
            assert sets[row].models == ["m"] * COUNTS[row]
            assert parse_record(sets[row].model_dump(exclude_none=True), ComparisonSet) == sets[row]
    for name in ("ann", "bob"):
        done, skipped, left = collected.progress(name)
        mine = [answer for (_, annotator), answer in newest.items() if annotator == name]
        assert done + skipped + left == len(COUNTS)
        assert skipped == sum(answer.skipped for answer in mine)
        assert left == len(COUNTS) - len(mine)


@given(histories())
def test_undo_goes_back_through_all_that_was_answered_and_the_rest_comes_in_the_order_of_rows(history: list[Answer]):
    """Changing an answer moves it nowhere."""
    collected = annotation()
    first: list[str] = []
    for answer in history:
        collected.add(answer)
        if answer.annotator == "ann" and answer.row not in first:
            first.append(answer.row)
    back: list[str] = []
    row = collected.first_left("ann")
    assert row == next((one for one in COUNTS if one not in first), None)
    while (row := collected.previous("ann", row)) is not None:
        back.append(row)
    assert back == first[::-1]
    skipped = [one for one in COUNTS if (answer := collected.answer("ann", one)) and answer.skipped]
    found: list[str] = []
    row = None
    while (row := collected.next_skipped("ann", row)) is not None:
        found.append(row)
    assert found == skipped


@given(st.data(), st.sampled_from(sorted(COUNTS)), st.text(min_size=1))
def test_an_annotator_sees_again_what_was_ranked_in_the_order_of_the_page(data: Any, row: str, name: str):
    """Positions become indices and positions again; a task names no model."""
    collected = annotation()
    shown = shown_order(name, row, COUNTS[row])
    positions = data.draw(rankings(COUNTS[row]))
    indices = renamed(positions, shown)
    collected.add(Answer(sequence=1, row=row, annotator=name, ranking=indices, skipped=False))
    task = collected.task(name, row)
    assert task.ranking == positions
    assert task.responses == [f"{row}-{index}" for index in shown]
    assert not hasattr(task, "models")


def test_every_response_stands_at_every_position_about_as_often_as_another():
    """Over 3,000 annotators, and over as many rows: within five deviations of a third."""
    for orders in (
        [shown_order(f"annotator {number}", "row", 3) for number in range(3000)],
        [shown_order("ann", f"row {number}", 3) for number in range(3000)],
    ):
        for position in range(3):
            times = Counter(order[position] for order in orders)
            assert all(abs(times[index] - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for index in range(3))
    assert shown_order("ann", "row", 5) == shown_order("ann", "row", 5)


@pytest.mark.parametrize(
    "ranking", [[], [0, 1], [0, 1, 1], [0, 1, 3], [0, 1, 2, 2], [[0, 1], [2]], [[], 0, 1, 2], [-1, 0, 1]]
)
def test_a_ranking_that_is_not_of_all_responses_once_is_named(ranking: Any):
    """Ties of one or of none are no ties."""
    assert "each of the 3 responses once" in annotation().problem("r1", ranking)
    assert annotation().problem("r1", [[0, 2], 1]) == ""
    assert annotation().problem("r1", None) == ""


def test_an_answer_to_a_row_that_is_not_there_is_kept_out_and_counted():
    """It may be of an earlier file of rows."""
    collected = annotation()
    collected.add(Answer(sequence=1, row="gone", annotator="ann", ranking=[0, 1], skipped=False))
    assert collected.strays == {"gone"}
    assert collected.annotators == []
    assert collected.comparison_sets() == []


def test_a_name_has_one_form_and_can_be_shown():
    """Spaces and the two ways to write an accent make no second person."""
    assert clean_name("  Zoe\u0308  B. ") == clean_name("Zoë B.") == "Zoë B."
    for bad in ("", " \t", "a\x1b[2J", "x" * (LONGEST_NAME + 1), "\ud800"):
        with pytest.raises(ValueError, match="name"):
            clean_name(bad)
