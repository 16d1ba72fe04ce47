"""Rows of public data sets. The texts are written here, in the shapes of those sets."""

import json
from typing import Any

import pytest

from rlhf.data.forms import FormReader, model_of
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, parse_record

USER = {"role": "user", "content": "Boil an egg?"}
GOOD = {"role": "assistant", "content": "Eight minutes."}
BAD = {"role": "assistant", "content": "No idea."}
MORE = {"role": "user", "content": "And then?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [USER, BAD, MORE, GOOD]

PAIR: dict[str, Any] = {"responses": ["Eight minutes.", "No idea."], "winners": [[0, 1, 1]]}
MEANT = "is not part of the form, and prompt or training may depend on it"
ANSWERED = {"prompt": [USER], "completion": "Eight minutes."}
HUMAN = "\n\nHuman: Boil an egg?\n\nAssistant: No idea.\n\nHuman: And then?\n\nAssistant: "


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


CASES: list[tuple[type[Any], dict[str, Any], dict[str, Any]]] = [
    (Demonstration, {"messages": [USER, GOOD]}, ANSWERED),
    (Demonstration, {"messages": TURNS}, {"prompt": TURNS[:3], "completion": "Eight minutes."}),
    (
        Demonstration,
        {"prompt": "Boil an egg?", "prompt_id": "ab", "messages": TURNS},
        {"prompt": TURNS[:3], "completion": "Eight minutes."},
    ),
    (Demonstration, {"messages": [USER | {"name": None, "tool_calls": []}, GOOD | {"tool_calls": None}]}, ANSWERED),
    (Demonstration, {"conversations": sharegpt(("human", "Boil an egg?"), ("gpt", "Eight minutes."))}, ANSWERED),
    (
        Demonstration,
        {
            "id": 3,
            "system": "Be brief.",
            "conversations": sharegpt(("human", "Boil an egg?"), ("gpt", "Eight minutes.")),
        },
        {"prompt": [SYSTEM, USER], "completion": "Eight minutes."},
    ),
    (Demonstration, {"conversation": [USER, GOOD], "language": "English"}, ANSWERED),
    (
        Demonstration,
        {"instruction": "Boil", "input": "", "output": "Eight."},
        {"prompt": "Boil", "completion": "Eight."},
    ),
    (
        Demonstration,
        {"instruction": "Boil", "input": "an egg", "output": "Eight.", "text": "### Instruction: …"},
        {"prompt": "Boil\n\nan egg", "completion": "Eight."},
    ),
    (
        Demonstration,
        {
            "instruction": "And then?",
            "output": "Eat.",
            "system": "Be brief.",
            "history": [["Boil an egg?", "No idea."]],
        },
        {"prompt": [SYSTEM, USER, BAD, MORE], "completion": "Eat."},
    ),
    (
        Demonstration,
        {"instruction": "Boil", "context": "an egg", "response": "Eight.", "category": "closed_qa"},
        {"prompt": "Boil\n\nan egg", "completion": "Eight."},
    ),
    (Demonstration, {"question": "1 + 1?", "answer": "2"}, {"prompt": "1 + 1?", "completion": "2"}),
    (
        Demonstration,
        {
            "prompt": [USER | {"content": [{"type": "text", "text": "Boil "}, {"type": "text", "text": "an egg?"}]}],
            "completion": "Eight.",
        },
        {"prompt": [USER], "completion": "Eight."},
    ),
    (
        Demonstration,
        {"prompt": "Boil an egg?", "completion": [BAD, MORE, GOOD]},
        {"prompt": TURNS[:3], "completion": [GOOD]},
    ),
    (ComparisonSet, {"chosen": HUMAN + "Eight minutes.", "rejected": HUMAN + "No idea."}, PAIR | {"prompt": TURNS[:3]}),
    *[
        (
            ComparisonSet,
            {"prompt": prompt, "chosen": HUMAN + "Eight minutes.", "rejected": HUMAN + "No idea."},
            PAIR | {"prompt": TURNS[:3]},
        )
        for prompt in (HUMAN, HUMAN.strip(), "And then?")
    ],
    (ComparisonSet, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIR | {"prompt": [USER]}),
    (
        Demonstration,
        {"messages": [USER, GOOD | {"toxic": False}], "toxic": False, "turn": 1},
        ANSWERED,
    ),
    (
        ComparisonSet,
        {
            "prompt": "Boil an egg?",
            "prompt_id": "ab",
            "chosen": [*TURNS[:3], GOOD],
            "rejected": [*TURNS[:3], BAD],
            "messages": TURNS,
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        PAIR | {"prompt": TURNS[:3]},
    ),
    (
        ComparisonSet,
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": 1.5},
        PAIR | {"prompt": [USER], "margin": 1.5},
    ),
    (
        ComparisonSet,
        {
            "chosen": sharegpt(("human", "Boil an egg?"), ("gpt", "Eight minutes.")),
            "rejected": sharegpt(("human", "Boil an egg?"), ("gpt", "No idea.")),
        },
        PAIR | {"prompt": [USER]},
    ),
    (
        ComparisonSet,
        {"system": "Be brief.", "question": "Boil an egg?", "chosen": "Eight minutes.", "rejected": "No idea."},
        PAIR | {"prompt": [SYSTEM, USER]},
    ),
    (ComparisonSet, {"prompt": "p", "source": "web", "chosen": [GOOD], "rejected": [BAD]}, PAIR | {"prompt": "p"}),
    (Prompt, {"messages": [SYSTEM, USER]}, {"prompt": [SYSTEM, USER]}),
]


@pytest.mark.parametrize(("model", "row", "record"), CASES)
def test_a_row_whose_meaning_is_certain_is_read_and_a_line_says_as_what(
    model: type[Any], row: dict[str, Any], record: dict[str, Any]
) -> None:
    """The fields tell the kind; prompt and answer are the row's own, word by word; nothing is read in silence."""
    assert model_of(row) is model
    reader = FormReader()
    found = reader.parse(row, model)
    assert not isinstance(found, list), found
    assert found.model_dump(exclude_none=True) == record
    assert reader.line()


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "Boil an egg?", "response": "Eight minutes."},
        {"conversations": [{"from": "human", "value": "Boil an egg?"}, {"from": "gpt", "value": "Eight minutes."}]},
    ],
)
def test_a_system_prompt_beside_an_instruction_or_a_conversation_begins_the_prompt(
    row: dict[str, Any], name: str
) -> None:
    """By each of its usual names; left out, the answers of OpenOrca would be learned without what they obey."""
    record = FormReader().parse(row | {name: "Be brief."}, Demonstration)
    assert record == Demonstration.model_validate({"prompt": [SYSTEM, USER], "completion": "Eight minutes."})


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": TURNS}, TURNS[:3]),
        ({"prompt": "p", "messages": [USER, GOOD], "prompt_id": "ab"}, "p"),
        ({"prompt": "p", "completion": "c"}, "p"),
        ({"prompt": "p", "system": "Be brief."}, [SYSTEM, {"role": "user", "content": "p"}]),
        ({"instruction": "Boil", "input": "an egg", "output": "Eight."}, "Boil\n\nan egg"),
        ({"chosen": HUMAN + "Eight minutes.", "rejected": HUMAN + "No idea."}, TURNS[:3]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p"),
    ],
)
def test_prompts_are_read_out_of_rows_that_hold_more(row: dict[str, Any], prompt: Any) -> None:
    """Answers are left out of a source of prompts, and the line says so."""
    reader = FormReader()
    assert reader.parse(row, Prompt) == Prompt.model_validate({"prompt": prompt})
    assert "prompts" in reader.line()


def test_the_line_counts_rows_by_form_and_names_the_fields_that_are_not_read() -> None:
    """Rows of our own form are not mentioned, and no bad row is."""
    reader = FormReader()
    for row in [{"messages": [USER, GOOD], "id": 1}] * 2 + [
        {"prompt": "p", "completion": "c", "source": "x"},
        {"messages": []},
    ]:
        reader.parse(row, Demonstration)
    assert reader.line() == (
        "2 rows read as conversations in 'messages': the last message is the completion, all before it the prompt; "
        "fields not read: id, source"
    )
    own = FormReader()
    own.parse({"prompt": "p", "completion": "c"}, Demonstration)
    assert own.line() == ""


@pytest.mark.parametrize(
    ("model", "row", "reason"),
    [
        (
            Demonstration,
            {"messages": [USER]},
            "messages: ends with a message of the role 'user', and must end with 'assistant'",
        ),
        (Demonstration, {"messages": [GOOD]}, "prompt: is empty"),
        (
            Demonstration,
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}]},
            "messages[1].tool_calls: calls a tool, and calls of tools are not trained on yet",
        ),
        (
            Demonstration,
            {"messages": [USER, GOOD], "tools": [{"name": "f"}]},
            "tools: offers tools, and calls of tools are not trained on yet",
        ),
        (Demonstration, {"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content: is null"),
        (
            Demonstration,
            {"prompt": [USER], "completion": [{"role": "assistant", "content": None}]},
            "completion[0].content: is null",
        ),
        (Demonstration, {"messages": [USER, {"role": "assistant"}]}, "messages[1].content: is missing"),
        (
            Demonstration,
            {"messages": [USER, GOOD | {"reasoning_content": "Hm."}]},
            "messages[1].reasoning_content: is unknown; known: content, role",
        ),
        (
            Demonstration,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, GOOD]},
            "messages[0].content[0]: is a part of the type 'image_url', and only text is trained on",
        ),
        (
            Demonstration,
            {"conversations": sharegpt(("human", "a"), ("observation", "b"), ("gpt", "c"))},
            "conversations[1].from: is 'observation'; "
            "known: system, human, user, gpt, chatgpt, bing, bard, model, assistant",
        ),
        (
            Demonstration,
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]},
            "conversations[1].value: is null",
        ),
        (
            Demonstration,
            {"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "b"}]},
            "conversations[0].from: is ['human']; "
            "known: system, human, user, gpt, chatgpt, bing, bard, model, assistant",
        ),
        (
            Demonstration,
            {"prompt": "p", "messages": [{"role": "user", "content": 5}, GOOD]},
            "messages[0].content: must be a text or a list of parts",
        ),
        (
            Demonstration,
            {"prompt": "Fry it?", "messages": [USER, GOOD]},
            "prompt: differs from the beginning of 'messages', so neither is certain",
        ),
        (
            Demonstration,
            {"prompt": "p", "completion": "c", "label": False},
            "label: says whether the completion is good, and all demonstrations are imitated alike",
        ),
        (Demonstration, {"question": "Who?", "context": "Bob did.", "answer": "Bob"}, f"context: {MEANT}"),
        (Demonstration, {"question": "Who?", "choices": ["Bob", "Al"], "answer": "A"}, f"choices: {MEANT}"),
        (Demonstration, {"messages": [USER, GOOD], "images": ["egg.png"]}, f"images: {MEANT}"),
        (Demonstration, {"instruction": "Boil", "output": "Eight.", "history": "a: b"}, f"history: {MEANT}"),
        (Demonstration, {"question": "Boil?", "answer": "No.", "is_correct": False}, f"is_correct: {MEANT}"),
        (Demonstration, {"prompt": "p", "response": "c", "is_safe": False}, f"is_safe: {MEANT}"),
        (Demonstration, {"messages": [USER, GOOD], "toxic": True}, f"toxic: {MEANT}"),
        *[
            (
                model,
                {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"} | {name: written},
                f"{name}: {why}",
            )
            for why in ("holds messages written as a text: write them as a list of objects",)
            for written in (json.dumps([USER, GOOD]), str([USER, GOOD]))
            for model, name in (
                (Prompt, "prompt"),
                (Demonstration, "prompt"),
                (Demonstration, "completion"),
                (ComparisonSet, "prompt"),
                (ComparisonSet, "rejected"),
            )
        ],
        (
            ComparisonSet,
            {"prompt": "Another?", "chosen": HUMAN + "Eight minutes.", "rejected": HUMAN + "No idea."},
            "prompt: differs from the beginning of 'chosen', so neither is certain",
        ),
        (Demonstration, {"messages": [USER, GOOD], "mask": [0, 0]}, f"mask: {MEANT}"),
        (ComparisonSet, {"question": "Who?", "context": "Bob.", "chosen": "a", "rejected": "b"}, f"context: {MEANT}"),
        (ComparisonSet, {"system": "Hi.", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, f"system: {MEANT}"),
        (
            Demonstration,
            {"messages": [USER, GOOD | {"weight": 0}]},
            "messages[1].weight: says that the answer must not be learned, but it would be",
        ),
        (
            Demonstration,
            {"system": "Be long.", "messages": [SYSTEM, USER, GOOD]},
            "system: differs from the beginning of 'messages', so neither is certain",
        ),
        (
            ComparisonSet,
            {"chosen": HUMAN + "a", "rejected": "\n\nHuman: Fry it?\n\nAssistant: b"},
            "chosen: and rejected differ before their last messages, so that no prompt is common",
        ),
        (
            ComparisonSet,
            {"chosen": [*TURNS], "rejected": [USER, GOOD]},
            "chosen: and rejected differ before their last messages, so that no prompt is common",
        ),
        (
            ComparisonSet,
            {"prompt": "Fry it?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "prompt: differs from the beginning of 'chosen', so neither is certain",
        ),
        (ComparisonSet, {"chosen": "The sky is blue.", "rejected": "It is green."}, "prompt: is missing"),
    ],
)
def test_a_row_whose_meaning_is_not_certain_is_refused_with_its_field(
    model: type[Any], row: dict[str, Any], reason: str
) -> None:
    """A guess would be trained on in silence."""
    found = FormReader().parse(row, model)
    assert isinstance(found, list), found
    assert [str(one) for one in found] == [reason]


@pytest.mark.parametrize(
    ("model", "row", "meant"),
    [
        (Demonstration, {"prompt": "p", "completion": "c", "promt": "q"}, "prompt"),
        (ComparisonSet, {"chosen": [USER, GOOD], "rejected": [USER, BAD], "margn": 1}, "margin"),
        (ComparisonSet, {"prompt": "p", "chosen": "a", "rejected": "b", "magrin": 1, "prompt_id": "x"}, "margin"),
        (
            ComparisonSet,
            {"prompt": "p", "responses": ["a", "b"], "winners": [[0, 1, 1]], "annotator": ["x"]},
            "annotators",
        ),
        (JudgeRating, {"text": "t", "rating": 1, "ratings": [2]}, "rating"),
    ],
)
def test_a_misspelt_field_of_ours_is_refused_whatever_else_a_row_carries(
    model: type[Any], row: dict[str, Any], meant: str
) -> None:
    """What somebody meant us to use must not pass for a column of bookkeeping."""
    found = FormReader().parse(row, model)
    assert isinstance(found, list), found
    assert f"did you mean {meant}?" in str(found[0])


@pytest.mark.parametrize(
    ("row", "without"),
    [
        ({"prompt": "p", "completion": "c", "chosen": None, "odd": None}, {"prompt": "p", "completion": "c"}),
        ({"prompt": [USER | {"name": None}], "completion": "c"}, {"prompt": [USER], "completion": "c"}),
        (
            {
                "prompt": "q",
                "chosen": None,
                "rejected": None,
                "responses": ["a", "b"],
                "ratings": [[1, None], [2, None]],
            },
            {"prompt": "q", "responses": ["a", "b"], "ratings": [[1, None], [2, None]]},
        ),
    ],
)
def test_a_null_field_is_an_absent_one(row: dict[str, Any], without: dict[str, Any]) -> None:
    """Parquet gives every row all columns; a null inside a list of ratings stays."""
    model = model_of(without)
    assert model_of(row) is model
    assert parse_record(row, model) == parse_record(without, model) == FormReader().parse(row, model)
    assert not isinstance(parse_record(without, model), list)
