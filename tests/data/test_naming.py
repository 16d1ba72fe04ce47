import pytest

from rlhf.data.annotations import marked, meant, mentioned, preference


@pytest.mark.parametrize(
    ("option", "names", "name"),
    [
        ("response-1", ("response-1", "response-2"), "response-1"),
        ("Response 2", ("response-1", "response-2"), "response-2"),
        ("reply-2", ("response-1", "response-2"), "response-2"),
        ("responseB", ("response_a", "response_b"), "response_b"),
        ("A", ("response_a", "response_b"), "response_a"),
        ("left", ("text_left", "text_right"), "text_left"),
        ("Right", ("answer1", "answer2"), "answer2"),
        ("Response 01", ("Response 1", "Response 11"), "Response 1"),
        ("1", ("Response 1", "Response 2"), None),
        ("level 1", ("Response 1", "Response 2"), None),
        ("Response 3", ("Response 1", "Response 2"), None),
        ("right", ("answer1", "answer2", "answer3"), None),
        ("unsure", ("answer1", "answer2"), None),
        ("", ("answer1", "answer2"), None),
        ("+", ("-", "="), None),
        ("9" * 5000, ("answer1", "answer2"), None),
    ],
)
def test_a_label_means_a_response_by_its_name_or_mark(option: str, names: tuple[str, ...], name: str | None) -> None:
    """A label may be about anything, so that a bare number or a word of another kind means no response."""
    assert meant(option, names, ranked=False) == name


@pytest.mark.parametrize(("option", "name"), [("1", "Response 1"), ("image 2", "Response 2"), ("4", None)])
def test_an_option_of_a_ranking_needs_only_the_mark(option: str, name: str | None) -> None:
    """All options of a ranking are responses."""
    assert meant(option, ("Response 1", "Response 2", "Response 3"), ranked=True) == name


def test_an_option_that_could_mean_two_responses_means_none() -> None:
    """Nothing is guessed."""
    assert meant("Response-1", ("response 1", "response_1"), ranked=True) is None
    assert meant("1", ("first 1", "second 1"), ranked=True) is None


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("generations-1-rating", "generations-1"),
        ("rating of generations 10", "generations-10"),
        ("generations1Quality", "generations-1"),
        ("regenerations-1", None),
        ("quality", None),
        ("generations-1 against generations-10", None),
    ],
)
def test_a_question_is_about_the_one_response_it_names(question: str, name: str | None) -> None:
    """Whole words count: generations-1 is not in generations-10."""
    assert mentioned(question, ("generations-1", "generations-10")) == name


def test_marks_and_ties() -> None:
    """A mark is a last number, letter or side; ties are said in a few words."""
    assert [found and found.mark for found in map(marked, ("r1", "text_left", "answerB", "prompt", ""))] == [
        "1",
        "left",
        "b",
        None,
        None,
    ]
    tied = [["a", "b"]]
    assert all(preference(label, ["a", "b"]) == tied for label in ("Tie", "both", "equally good", "Both bad"))
    labels = ("", "response-1", "both of them are fine", "untie")
    assert not any(preference(label, ["a", "b"]) == tied for label in labels)
