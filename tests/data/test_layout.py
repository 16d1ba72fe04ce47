from typing import Any

import pytest

from rlhf.data.annotations import Layout, Wanted, find_layout, read_models, read_responses
from rlhf.data.records import MalformedError

ITEMS = [{"id": "llm_1", "title": "LLM 1", "body": "a"}, {"id": 2, "title": "b"}]


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"prompt": "p", "answer2": "b", "answer1": "a"}, Layout("prompt", ("answer1", "answer2"))),
        ({"instruction": "p", "response1": "a", "response2": "b"}, Layout("instruction", ("response1", "response2"))),
        (
            {"id": "8f", "instruction": "p", "generations-0": "a", "generations-10": "c", "generations-2": None},
            Layout("instruction", ("generations-0", "generations-2", "generations-10")),
        ),
        ({"context": "p", "text_right": "b", "text_left": "a"}, Layout("context", ("text_left", "text_right"))),
        ({"prompt": "p", "Golden Answer": "g", "R1": "a", "R2": "b"}, Layout("prompt", ("R1", "R2"))),
        (
            {"prompt": [{"role": "user", "content": "p"}], "A": "a", "B": "b", "model_1": "x", "model_2": "y"},
            Layout("prompt", ("A", "B")),
        ),
        ({"prompt": "p", "items": ITEMS}, Layout("prompt", ("items",))),
    ],
)
def test_the_fields_of_prompt_and_responses_are_told_by_their_names(fields: dict[str, Any], layout: Layout) -> None:
    """Those of the tools' templates, of distilabel and of people."""
    assert find_layout(fields, Wanted()) == layout


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"text": "p", "good": "a", "bad": "b"}, "the responses' fields are not clear"),
        ({"prompt": "p", "answer": "a"}, "the responses' fields are not clear"),
        ({"prompt": "p", "a1": "a", "a2": "b", "b1": "c", "b2": "d"}, "the responses' fields are not clear"),
        ({"prompt": "p", "question": "q", "a1": "a", "a2": "b"}, "the prompt's field is not clear"),
        ({"text": "p", "context": "q", "a1": "a", "a2": "b"}, "the prompt's field is not clear"),
        ({"a1": "a", "a2": "b"}, "the prompt's field is not clear"),
        ({}, "there are none"),
    ],
)
def test_names_that_do_not_tell_are_an_error_that_lists_the_fields(fields: dict[str, Any], problem: str) -> None:
    """Nothing is guessed, and whoever reads the error sees what to choose from."""
    with pytest.raises(MalformedError) as caught:
        find_layout(fields, Wanted())
    assert problem in caught.value.reason.problem
    assert all(name in caught.value.reason.problem for name in fields)


def test_what_is_wanted_goes_before_what_is_told() -> None:
    """Options settle what names leave open, in the order given."""
    fields = {"text": "p", "good": "a", "bad": "b", "note": "n"}
    assert find_layout(fields, Wanted("text", ("good", "bad"))) == Layout("text", ("good", "bad"))
    fields = {"answer1": "p", "answer2": "a", "answer3": "b"}
    assert find_layout(fields, Wanted("answer1")) == Layout("answer1", ("answer2", "answer3"))
    with pytest.raises(MalformedError, match="cannot be both"):
        find_layout(fields, Wanted("answer1", ("answer1", "answer2")))


def test_responses_are_read_by_name_without_those_that_are_null() -> None:
    """Of a list's items the body counts, else the title; identifiers are texts, as in the answers."""
    fields = {"prompt": "p", "r1": "a", "r2": None, "r3": ""}
    assert read_responses(fields, Layout("prompt", ("r1", "r2", "r3", "r4"))) == {"r1": "a", "r3": ""}
    assert read_responses({"items": ITEMS}, Layout("prompt", ("items",))) == {"llm_1": "a", "2": "b"}


@pytest.mark.parametrize("items", [None, "a", ["a", "b"], [{"body": "a"}]])
def test_a_list_of_responses_must_have_identifiers(items: Any) -> None:
    """Answers name responses by them."""
    with pytest.raises(MalformedError) as caught:
        read_responses({"items": items}, Layout("prompt", ("items",)))
    assert str(caught.value.reason) == "items: must list the responses as objects with an id"


def test_two_items_of_one_identifier_are_refused() -> None:
    """One would take the other's place."""
    with pytest.raises(MalformedError, match="same id"):
        read_responses({"items": [{"id": 1, "body": "a"}, {"id": "1", "body": "b"}]}, Layout("prompt", ("items",)))


@pytest.mark.parametrize(
    ("metadata", "models"),
    [
        ({"models": ["x", "y", "z"]}, ["x", "z"]),
        ({"model_1": "x", "model_3": "z"}, ["x", "z"]),
        ({"response-1-model": ["x"], "model name response-3": "z"}, ["x", "z"]),
        ({"model_1": "x", "model_2": "y"}, None),
        ({"models": ["x", "y"]}, None),
        ({"model": "x"}, None),
        ({}, None),
    ],
)
def test_models_are_named_for_all_responses_or_for_none(metadata: dict[str, Any], models: list[str] | None) -> None:
    """The second response is null in this record."""
    layout = Layout("prompt", ("response-1", "response-2", "response-3"))
    assert read_models(metadata, layout, ["response-1", "response-3"]) == models
