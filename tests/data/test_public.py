"""Public data sets through the conversion. The texts are written here, in the shapes of those sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.annotations import Wanted
from rlhf.data.convert import Converted, convert_file
from rlhf.data.records import ComparisonSet, Demonstration, read_rows
from rlhf.data.validation import RecordReader, validate_file
from rlhf.errors import RecordError, RequestError


def converted(folder: Path, rows: list[dict[str, Any]], question: str = "") -> tuple[Converted, list[dict[str, Any]]]:
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = Wanted(questions=(question,) if question else ())
    found = convert_file(str(source), folder / "out.jsonl", None, wanted)
    assert validate_file(str(folder / "out.jsonl"), None) == ("comparisons", found.sets, "")
    return found, read_rows(folder / "out.jsonl")


def helpful(prompt: str, response: str, helpfulness: int, verbosity: int = 1) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": verbosity}


def message(
    identifier: str, parent: str | None, role: str, text: str, rank: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "message_id": identifier,
        "parent_id": parent,
        "message_tree_id": "a",
        "role": role,
        "text": text,
        "rank": rank,
    } | more


TREE = [
    message("a", None, "prompter", "Boil an egg?"),
    message("b", "a", "assistant", "Eight minutes.", 0),
    message("c", "a", "assistant", "No idea.", 2),
    message("d", "a", "assistant", "Ten minutes.", 1),
    message("e", "a", "assistant", "spam", None),
    message("f", "a", "assistant", "rude", 3, deleted=True),
    message("g", "c", "prompter", "Think!", 0),
    message("h", "g", "assistant", "Still none.", 1),
    message("i", "g", "assistant", "Eight.", 0),
]
TREE_SETS = [
    {
        "prompt": [{"role": "user", "content": "Boil an egg?"}],
        "responses": ["Eight minutes.", "No idea.", "Ten minutes."],
        "rankings": [[0, 2, 1]],
    },
    {
        "prompt": [
            {"role": "user", "content": "Boil an egg?"},
            {"role": "assistant", "content": "No idea."},
            {"role": "user", "content": "Think!"},
        ],
        "responses": ["Still none.", "Eight."],
        "rankings": [[1, 0]],
    },
]


def nested(identifier: str) -> dict[str, Any]:
    (found,) = (one for one in TREE if one["message_id"] == identifier)
    return found | {"replies": [nested(one["message_id"]) for one in TREE if one["parent_id"] == identifier]}


def test_helpsteer_s_responses_to_one_prompt_are_a_set_wherever_they_stand(tmp_path: Path) -> None:
    """Ratings are of helpfulness; a prompt with one response has nothing to compare, and is counted."""
    rows = [helpful("p", "a", 4), helpful("q", "c", 3), helpful("p", "b", 2)]
    found, sets = converted(tmp_path, rows)
    assert sets == [{"prompt": "p", "responses": ["a", "b"], "ratings": [[4.0], [2.0]]}]
    assert (found.rated, found.left_out) == ("helpfulness", {"prompts with one response": 1})


def test_another_attribute_of_helpsteer_is_taken_when_it_is_asked_for(tmp_path: Path) -> None:
    """One that there is not is refused with those there are."""
    rows = [helpful("p", "a", 4, verbosity=0), helpful("p", "b", 2, verbosity=3)]
    assert converted(tmp_path, rows, "verbosity")[1][0]["ratings"] == [[0.0], [3.0]]
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(RequestError, match="no ratings 'helpfulnes'") as caught:
        converted(tmp_path, rows, "helpfulnes")
    assert "did you mean helpfulness?" in caught.value.next_step


def test_a_prompt_of_several_turns_in_helpsteer_becomes_messages(tmp_path: Path) -> None:
    """Its marks of turns must not be read as text."""
    prompt = "Hi.\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nBoil an egg?"
    _, sets = converted(tmp_path, [helpful(prompt, "a", 4), helpful(prompt, "b", 2)])
    assert sets[0]["prompt"] == [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Boil an egg?"},
    ]


def test_shp_s_label_names_the_winner_and_its_scores_are_no_ratings(tmp_path: Path) -> None:
    """1 is for A, 0 is for B; votes depend on when a reply was written, so that they say less than the label."""
    row = {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "score_A": 12, "score_B": 2, "score_ratio": 6.0}
    _, sets = converted(tmp_path, [row | {"labels": 1}, row | {"labels": 0}])
    assert sets == [{"prompt": "p", "responses": ["a", "b"], "winners": [[0.0, 1.0, label]]} for label in (1.0, 0.0)]
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(RecordError, match="1 of 1 records are malformed") as caught:
        converted(tmp_path, [row | {"labels": 2}])
    assert "labels: is 2; it must be 1" in caught.value.where


@pytest.mark.parametrize("form", ["trees", "messages", "messages in any order"])
def test_oasst_s_ranked_answers_are_a_set_with_all_that_was_said_before(tmp_path: Path, form: str) -> None:
    """Trees and rows of messages hold the same; what has no rank or was deleted is left out."""
    rows = {
        "trees": [{"message_tree_id": "a", "prompt": nested("a")}],
        "messages": TREE,
        "messages in any order": TREE[::-1],
    }
    _, sets = converted(tmp_path, rows[form])
    if form == "messages in any order":
        assert {json.dumps(one["prompt"]) for one in sets} == {json.dumps(one["prompt"]) for one in TREE_SETS}
        assert [one["responses"][one["rankings"][0][0]] for one in sets] == ["Eight minutes.", "Eight."]
    else:
        assert sets == TREE_SETS


def test_an_oasst_message_without_its_parent_is_counted(tmp_path: Path) -> None:
    """What was said before it is not in the file."""
    found, _ = converted(tmp_path, [*TREE, message("z", "gone", "assistant", "Yes.", 0)])
    assert found.left_out["messages whose parent is not in the file"] == 1


def test_ultrafeedback_s_scores_become_ratings(tmp_path: Path) -> None:
    """Of its four responses with the models that wrote them, and of the binarized pair, equal scores included."""
    completions = [
        {"response": text, "model": f"m{text}", "overall_score": score} for text, score in (("a", 8), ("b", 3.5))
    ]
    messages = [{"role": "user", "content": "p"}]
    pair = {
        "prompt": "p",
        "chosen": [*messages, {"role": "assistant", "content": "a"}],
        "rejected": [*messages, {"role": "assistant", "content": "b"}],
        "score_chosen": 7.0,
        "score_rejected": 7.0,
    }
    found, sets = converted(tmp_path, [{"instruction": "p", "completions": completions}])
    assert sets == [{"prompt": "p", "responses": ["a", "b"], "ratings": [[8.0], [3.5]], "models": ["ma", "mb"]}]
    assert found.rated == "overall_score"
    (tmp_path / "out.jsonl").unlink()
    found, sets = converted(tmp_path, [pair])
    assert sets == [{"prompt": messages, "responses": ["a", "b"], "ratings": [[7.0], [7.0]]}]
    assert (found.rated, found.left_out) == ("", {})


@pytest.mark.parametrize("model", [Demonstration, ComparisonSet])
def test_rows_that_must_be_converted_are_refused_with_the_line_that_does_it(tmp_path: Path, model: Any) -> None:
    """HelpSteer's rows have a prompt and a response, and are no demonstrations."""
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(helpful("p", "a", 4)) + "\n" + json.dumps(helpful("p", "b", 2)) + "\n")
    for read in (
        lambda: list(RecordReader(str(source), model, tmp_path / "quarantine.jsonl")),
        lambda: validate_file(str(source), None),
    ):
        with pytest.raises(RecordError, match="those of HelpSteer") as caught:
            read()
        assert caught.value.next_step == f"rlhf data convert {source} comparisons.jsonl"


def test_a_record_of_another_data_set_in_the_file_is_malformed(tmp_path: Path) -> None:
    """A file of two data sets is a mistake of whoever joined them."""
    with pytest.raises(RecordError, match="1 of 3 records are malformed") as caught:
        converted(tmp_path, [helpful("p", "a", 4), helpful("p", "b", 2), {"prompt": "p"}])
    assert "record 3: is no record of HelpSteer; its fields are prompt" in caught.value.where
