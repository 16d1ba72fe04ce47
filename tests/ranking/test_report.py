from typing import Any

import numpy as np
import pytest

from rlhf.data.records import ComparisonSet
from rlhf.ranking.report import agreement, in_words, report
from rlhf.ranking.scales import ComparedSet, compared_sets


def read(*rows: dict[str, Any]) -> tuple[list[ComparisonSet], list[ComparedSet]]:
    records = [ComparisonSet.model_validate({"prompt": "p"} | row) for row in rows]
    return records, compared_sets(records, "train.jsonl", {})


def test_what_there_is_is_counted() -> None:
    """Annotators by name, pairs once however often they were compared, and a line that says so."""
    records, compared = read(
        {"responses": ["a", "b", "c"], "ratings": [[2, 1], [1, 0], [0, None]], "annotators": ["x", "y"]},
        {"responses": ["a", "b"], "ratings": [[3], [1]], "annotators": ["x"]},
        {"responses": ["d", "e"], "winners": [[0, 1, 1], [0, 1, 0.5]]},
    )
    found = report(records, compared)
    assert (found["sets"], found["responses"], found["annotators"]) == (3, 7, 2)
    assert (found["comparisons"], found["pairs"]) == (4 + 1 + 2, 3 + 1 + 1)
    lines = in_words(found)
    assert len(lines) == 1
    assert lines[0].startswith("3 sets of 7 responses; 7 comparisons of 5 pairs by 2 annotators")


@pytest.mark.parametrize(
    ("named", "unnamed", "said"),
    [
        (0, 3, "9 comparisons of 9 pairs by annotators without names in 3 sets"),
        (2, 3, "15 comparisons of 15 pairs by 2 annotators and by annotators without names in 3 sets"),
        (0, 0, "1 comparisons of 1 pairs"),
    ],
)
def test_annotators_without_names_are_not_counted_as_different_people(named: int, unnamed: int, said: str) -> None:
    """One person who rated all sets without a name is one person; how many there are cannot be known."""
    rated: dict[str, Any] = {"responses": ["a", "b", "c"], "rankings": [[0, 1, 2]]}
    rows = [rated | {"annotators": [f"name {n}"]} for n in range(named)] + [rated] * unnamed
    records, compared = read(*(rows or [{"responses": ["a", "b"], "winners": [[0, 1, 1]]}]))
    found = report(records, compared)
    assert (found["annotators"], found["sets_of_unnamed_annotators"]) == (named, unnamed)
    assert in_words(found)[0].split("; ")[1].split(", who agree")[0] == said


def test_what_may_be_wrong_is_counted_and_said() -> None:
    """Circles of majorities, the never compared, repetitions, and winners who contradict."""
    circle = {"responses": ["x", "y", "z"], "rankings": [[0, 1, 2], [1, 2, 0], [2, 0, 1]]}
    lonely = {"responses": ["a", "b", "c"], "ratings": [[1.0], [2.0], [None]]}
    repeated = {"responses": ["a", "a", "b"], "ratings": [[1.0], [1.0], [0.0]]}
    contradicted = {"responses": ["f", "g"], "ratings": [[2.0], [1.0]], "winners": [[1, 0, 1]]}
    records, compared = read(circle, lonely, repeated, contradicted, contradicted)
    found = report(records, compared)
    assert found["sets_with_cycles"] == 1
    assert found["responses_never_compared"] == 1
    assert found["responses_repeated_in_their_set"] == 1
    assert found["pairs_where_winners_contradict_annotators"] == 2
    assert found["sets_repeated"] == 1
    assert len(in_words(found)) == 1 + 5


def slow_alpha(rows: list[list[float]]) -> float:
    """Krippendorff's alpha with the interval metric, pair by pair: 1 - observed / expected disagreement."""
    rows = [row for row in rows if len(row) > 1]
    total = sum(map(len, rows))
    observed = sum((a - b) ** 2 / (len(row) - 1) for row in rows for a in row for b in row) / total
    every = [value for row in rows for value in row]
    expected = sum((a - b) ** 2 for a in every for b in every) / (total * (total - 1))
    return 1 - observed / expected


def test_agreement_is_krippendorffs_alpha() -> None:
    """With two grades the ordinal metric is the interval's; full agreement is 1, chance 0."""
    rng = np.random.default_rng(0)
    grades = rng.integers(0, 2, (40, 4)).astype(float).tolist()
    _, compared = read({"responses": [str(n) for n in range(40)], "ratings": grades})
    found = agreement(compared)
    assert found is not None
    assert found == pytest.approx(slow_alpha(grades))
    assert abs(found) < 0.15
    _, compared = read({"responses": ["a", "b", "c"], "ratings": [[1, 1], [2, 2], [3, 3]]})
    assert agreement(compared) == 1
    _, compared = read({"responses": ["a", "b", "c"], "rankings": [[0, 1, 2], [0, 1, 2]]})
    assert agreement(compared) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"responses": ["a", "b"], "ratings": [[1.0], [2.0]]},
        {"responses": ["a", "b"], "ratings": [[1.0, 1.0], [1.0, 1.0]]},
        {"responses": ["a", "b"], "winners": [[0, 1, 1]]},
    ],
)
def test_where_there_is_nothing_to_agree_on_there_is_no_number(row: dict[str, Any]) -> None:
    """One annotator, everything alike, or nobody's winners: no figure is made up."""
    _, compared = read(row)
    assert agreement(compared) is None


def test_where_every_count_is_another_each_stands_under_its_name() -> None:
    """One circle, two contradictions, three never compared, four repetitions, five sets more than once."""
    circle = {"responses": ["x", "y", "z"], "rankings": [[0, 1, 2], [1, 2, 0], [2, 0, 1]]}
    no_circle = {"responses": ["x", "y", "w"], "rankings": [[0, 1, 2], [0, 2, 1], [2, 0, 1], [1, 0, 2]]}
    contradicted = {
        "responses": ["f", "g", "h"],
        "ratings": [[2.0, 2.0, 0.0], [1.0, 1.0, 1.0], [3.0, 3.0, 3.0]],
        "winners": [[1, 0, 1], [1, 0, 1], [0, 1, 1], [0, 2, 1], [2, 1, 1]],
    }
    lonely = {"responses": list("abcde"), "ratings": [[1.0], [2.0], [None], [None], [None]]}
    repeated = {"responses": ["a", "a", "a", "b", "b", "b"], "rankings": [[0, 1, 2, 3, 4, 5]]}
    there_again = [{"prompt": "q", "responses": order, "winners": [[0, 1, 1]]} for order in (["s", "t"], ["t", "s"])]
    other_prompt = {"prompt": "r", "responses": ["s", "t"], "winners": [[0, 1, 0.5]]}
    rows = [circle, no_circle, contradicted, lonely, repeated, *there_again, *there_again[:1] * 4, other_prompt]
    found = report(*read(*rows))
    assert found["sets_with_cycles"] == 1
    assert found["pairs_where_winners_contradict_annotators"] == 2
    assert found["responses_never_compared"] == 3
    assert found["responses_repeated_in_their_set"] == 4
    assert found["sets_repeated"] == 5
    assert found["sets_of_unnamed_annotators"] == 5
    assert in_words(found)[1:] == [
        "1 sets where majorities form a cycle",
        "3 responses never compared with another of their set",
        "2 pairs whose winners contradict ratings and rankings",
        "4 responses repeated in their set",
        "5 repeated sets",
    ]


@pytest.mark.parametrize("distinct", [200, 201])
def test_ratings_are_grades_up_to_two_hundred_different_ones_and_then_measurements(distinct: int) -> None:
    """Grades have an order alone, so that stretching them changes nothing; measurements have distances."""
    rng = np.random.default_rng(0)
    rows = np.stack([np.arange(distinct), rng.permutation(distinct)], axis=1).astype(float)

    def alpha_of(ratings: np.ndarray[Any, Any]) -> float:
        _, compared = read({"responses": [str(n) for n in range(distinct)], "ratings": ratings.tolist()})
        found = agreement(compared)
        assert found is not None
        return found

    straight, stretched = alpha_of(rows), alpha_of(rows**3)
    if distinct == 200:
        assert stretched == pytest.approx(straight)
        assert stretched != pytest.approx(slow_alpha((rows**3).tolist()))
    else:
        assert stretched == pytest.approx(slow_alpha((rows**3).tolist()))


def test_agreement_is_of_all_responses_with_two_ratings_whoever_gave_them() -> None:
    """Of sets with other numbers of annotators side by side; rankings count only where nobody rated."""
    first = {"responses": ["a", "b", "c"], "ratings": [[1, None, 0], [0, 0, None], [None, 1, None]]}
    second = {"responses": ["d", "e"], "ratings": [[1, 1, 0, 1], [0, None, None, 1]]}
    ranked = {"responses": ["f", "g"], "rankings": [[0, 1], [1, 0]]}
    _, compared = read(first, second, ranked)
    assert agreement(compared) == pytest.approx(slow_alpha([[1, 0], [0, 0], [1], [1, 1, 0, 1], [0, 1]]))
    _, compared = read(ranked)
    assert agreement(compared) == pytest.approx(slow_alpha([[0, 1], [1, 0]]))
