from typing import Any

import pytest

from rlhf.data.forms import model_of
from rlhf.data.records import (
    ComparisonSet,
    Demonstration,
    JudgeRating,
    Prompt,
    parse_record,
)

MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}]
SET: dict[str, Any] = {"prompt": "p", "responses": ["a", "b", "c"]}


def reasons(value: Any, model: Any) -> list[str]:
    record = parse_record(value, model)
    assert isinstance(record, list), record
    return [str(reason) for reason in record]


@pytest.mark.parametrize(
    ("value", "model"),
    [
        ({"prompt": "p", "completion": "c"}, Demonstration),
        ({"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "c"}]}, Demonstration),
        ({"prompt": MESSAGES}, Prompt),
        ({"text": "t", "rating": 1}, JudgeRating),
        (SET | {"ratings": [[1, None], [2.5, 0], [None, -1]]}, ComparisonSet),
        (SET | {"rankings": [[0, [1, 2]], [2, 0]]}, ComparisonSet),
        (SET | {"winners": [[0, 1, 0.5], [2, 1, 0]], "models": ["x", "x", "y"]}, ComparisonSet),
    ],
)
def test_a_good_record_is_kept_as_it_comes(value: dict[str, Any], model: Any) -> None:
    """Reading and writing a record changes nothing of it, and its fields tell its kind."""
    record = parse_record(value, model)
    assert not isinstance(record, list), record
    assert record.model_dump(exclude_none=True) == value
    assert model_of(value) is model


def test_a_trl_pair_becomes_a_set_of_two_with_its_winner_and_margin() -> None:
    """TRL's conversational replies are read as their texts."""
    pair = {
        "prompt": MESSAGES,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": "bad",
        "margin": 2,
    }
    record = parse_record(pair, ComparisonSet)
    assert isinstance(record, ComparisonSet)
    assert record.model_dump(exclude_none=True) == {
        "prompt": MESSAGES,
        "responses": ["good", "bad"],
        "winners": [[0, 1, 1]],
        "margin": 2,
    }


@pytest.mark.parametrize(
    ("value", "model", "reason"),
    [
        ([1], Prompt, "a row must be an object with fields, not list"),
        (None, Prompt, "a row must be an object with fields, not NoneType"),
        ({}, Prompt, "prompt: is missing"),
        ({"prompt": " \n"}, Prompt, "prompt: is empty"),
        ({"prompt": []}, Prompt, "prompt: is empty"),
        ({"prompt": 3}, Prompt, "prompt: must be a text or a list of messages"),
        ({"prompt": None}, Prompt, "prompt: is missing"),
        ({"prompt": "half \ud800"}, Prompt, "prompt: holds bytes that are not UTF-8, or half a surrogate pair"),
        ({"prompt": [{"role": "user", "content": " "}]}, Prompt, "prompt: is empty"),
        ({"prompt": [{"role": "user"}]}, Prompt, "prompt[0].content: is missing"),
        (
            {"prompt": [{"rule": "user", "role": "user", "content": "x"}]},
            Prompt,
            "prompt[0].rule: is unknown; did you mean role? known: content, role",
        ),
        (
            {"prompt": "p", "completion": "c", "promt": "p"},
            Demonstration,
            "promt: is unknown; did you mean prompt? known: completion, group, prompt",
        ),
        ({"prompt": "p", "completion": ""}, Demonstration, "completion: is empty"),
        (
            {"prompt": "p", "completion": [{"role": "user", "content": "c"}]},
            Demonstration,
            "completion: ends with a message of the role 'user', and must end with 'assistant'",
        ),
        ({"text": "t", "rating": float("nan")}, JudgeRating, "rating: input should be a finite number"),
        ({"text": "t", "rating": "4"}, JudgeRating, "rating: input should be a valid number"),
        ({"text": "t", "rating": True}, JudgeRating, "rating: input should be a valid number"),
        (SET, ComparisonSet, "has none of ratings, rankings and winners"),
        (
            {"prompt": "p", "responses": ["a"], "winners": []},
            ComparisonSet,
            "responses: list should have at least 2 items after validation, not 1",
        ),
        (SET | {"responses": ["a", 2, "c"]}, ComparisonSet, "responses[1]: input should be a valid string"),
        (SET | {"ratings": [[1], [2]]}, ComparisonSet, "ratings: has 2 rows for 3 responses"),
        (
            SET | {"ratings": [[1, 2], [2], [3, 4]]},
            ComparisonSet,
            "ratings: has rows of different lengths, [2, 1, 2]: "
            "write null where an annotator gave a response no rating",
        ),
        (
            SET | {"ratings": [[1], [float("nan")], [3]]},
            ComparisonSet,
            "ratings[1][0]: input should be a finite number",
        ),
        (
            SET | {"ratings": [[1, None, None], [None, 2, None], [None, None, 3]]},
            ComparisonSet,
            "compares nothing: no annotator rated or ranked two of the responses",
        ),
        (
            SET | {"ratings": [[1, 2], [2, 2], [3, 4]], "annotators": ["a"]},
            ComparisonSet,
            "annotators: has 1 names for 2 columns of ratings: one list serves ratings and rankings",
        ),
        (
            SET | {"ratings": [[1, 2], [2, 2], [3, 4]], "rankings": [[0, 1]], "annotators": ["a", "b"]},
            ComparisonSet,
            "annotators: has 2 names for 1 rankings: one list serves ratings and rankings",
        ),
        (
            SET | {"rankings": [[0, 1], [1, 0]], "annotators": ["a", "a"]},
            ComparisonSet,
            "annotators: names 'a' twice",
        ),
        (
            SET | {"winners": [[0, 1, 1]], "annotators": ["a"]},
            ComparisonSet,
            "has annotators but neither ratings nor rankings: winners have no annotators",
        ),
        (SET | {"rankings": [[0, 1], [2, 1, 2]]}, ComparisonSet, "rankings: ranking 1 names response 2 twice"),
        (SET | {"rankings": [[0, [1, 0]]]}, ComparisonSet, "rankings: ranking 0 names response 0 twice"),
        (
            SET | {"rankings": [[0, 3]]},
            ComparisonSet,
            "rankings: ranking 0 names response 3, and there are 0 to 2",
        ),
        (SET | {"rankings": [["a"]]}, ComparisonSet, "rankings[0][0]: input should be a valid integer"),
        (SET | {"winners": [[0, -1, 1]]}, ComparisonSet, "winners: entry 0 names response -1, and there are 0 to 2"),
        (SET | {"winners": [[0, 1.5, 1]]}, ComparisonSet, "winners: entry 0 names response 1.5, and there are 0 to 2"),
        (SET | {"winners": [[1, 1, 1]]}, ComparisonSet, "winners: entry 0 compares response 1 with itself"),
        (
            SET | {"winners": [[0, 1, 1], [0, 1, 2]]},
            ComparisonSet,
            "winners: entry 1 is [0, 1, 2]; it must be [i, j, 1, 0 or 0.5]",
        ),
        (SET | {"winners": [[0, 1]]}, ComparisonSet, "winners: entry 0 is [0, 1]; it must be [i, j, 1, 0 or 0.5]"),
        (SET | {"winners": [[0, 1, 1]], "models": ["x"]}, ComparisonSet, "models: has 1 names for 3 responses"),
        (SET | {"winners": [[0, 1, 1]], "margin": 1}, ComparisonSet, "margin: is for two responses, and there are 3"),
        ({"prompt": "p", "chosen": "a"}, ComparisonSet, "rejected: is missing"),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "margins": 1},
            ComparisonSet,
            "margins: is unknown; did you mean margin? known: chosen, group, margin, prompt, rejected",
        ),
        (
            {"prompt": "p", "chosen": MESSAGES, "rejected": "b"},
            ComparisonSet,
            "chosen: input should be a valid string",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_field_and_what_is_wrong(value: Any, model: Any, reason: str) -> None:
    """One reason, and the right one, for each way a row can be malformed."""
    assert reasons(value, model) == [reason]


def test_every_bad_field_of_a_row_is_named_at_once() -> None:
    """Nobody should have to run the check once per mistake."""
    assert reasons({"promt": "p", "completion": ""}, Demonstration) == [
        "prompt: is missing",
        "completion: is empty",
        "promt: is unknown; did you mean prompt? known: completion, group, prompt",
    ]


def test_a_bad_set_of_responses_does_not_hide_a_bad_ranking() -> None:
    """Checks against the number of responses wait until it is known; the others do not."""
    assert reasons({"prompt": "p", "responses": "ab", "rankings": [[0, 0]]}, ComparisonSet) == [
        "responses: input should be a valid list",
        "rankings: ranking 0 names response 0 twice",
    ]
