"""Samples are written as Label Studio 1 exports them: JSON as of April 2023 (HumanSignal/RLHF has such a file), the
Ranker of then and of 2025, and JSON_MIN as label-studio-sdk's converter of 2025 writes it.
"""

from collections import Counter
from typing import Any

import pytest

from rlhf.data.annotations import Wanted, find_layout
from rlhf.data.label_studio import belongs, fields_of, read, recognises
from rlhf.data.records import MalformedError

PAIR = {"prompt": "Name a colour.", "answer1": "Blue.", "answer2": "Seven."}
ITEMS = {
    "prompt": "Name a colour.",
    "items": [{"id": f"llm_{number}", "title": f"LLM {number}", "body": body} for number, body in enumerate("abc", 1)],
}
THREE = ["a", "b", "c"]


def result(kind: str, name: str, target: str, **value: Any) -> dict[str, Any]:
    return {
        "value": value,
        "id": "Sba4F4tuVh",
        "from_name": name,
        "to_name": target,
        "type": kind,
        "origin": "manual",
    }


def pairwise(selected: str, target: str = "comparison") -> dict[str, Any]:
    """The tag's result names itself where one would expect the two texts."""
    return result("pairwise", "comparison", target, selected=selected)


def ranker(value: Any) -> dict[str, Any]:
    return result("ranker", "rank", "answers", ranker=value)


def annotation(who: Any, *results: dict[str, Any], day: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "id": 68045,
        "completed_by": who,
        "result": list(results),
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": f"2025-04-{day:02}T21:54:20.457543Z",
        "updated_at": f"2025-04-{day:02}T21:54:20.457580Z",
        "lead_time": 12.51,
        "prediction": {},
        "result_count": 1,
        "task": 401635,
    } | more


def task(data: dict[str, Any], *annotations: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": 401635,
        "annotations": list(annotations),
        "file_upload": "65af2932-input.json",
        "drafts": [],
        "predictions": [],
        "data": data,
        "meta": {},
        "inner_id": 1,
        "total_annotations": len(annotations),
        "project": 183,
    } | more


def flat(data: dict[str, Any], who: Any, day: int = 1, **tags: Any) -> dict[str, Any]:
    """JSON_MIN: the data, the task's id, what the tags hold, and then the annotation's own."""
    return {
        **data,
        "id": 401635,
        **tags,
        "annotator": who,
        "annotation_id": 68045,
        "created_at": f"2025-04-{day:02}T21:54:20.457543Z",
        "updated_at": f"2025-04-{day:02}T21:54:20.457580Z",
        "lead_time": 12.51,
    }


def read_all(*records: dict[str, Any], wanted: Wanted | None = None) -> Any:
    assert all(map(recognises, records))
    wanted = wanted or Wanted()
    return read(records, find_layout(fields_of(records), wanted), wanted)


def reason(*records: dict[str, Any], wanted: Wanted | None = None) -> str:
    with pytest.raises(MalformedError) as caught:
        read_all(*records, wanted=wanted).as_row()
    return str(caught.value.reason)


def test_pairwise_choices_of_several_people() -> None:
    """Left is the first response; people are named by e-mail where the export has it."""
    eve = {"id": 9, "email": "eve@example.org", "first_name": "", "last_name": ""}
    found = read_all(task(PAIR, annotation(2, pairwise("left")), annotation(eve, pairwise("right"))))
    assert found.as_row() == {
        "prompt": "Name a colour.",
        "responses": ["Blue.", "Seven."],
        "rankings": [[0, 1], [1, 0]],
        "annotators": ["2", "eve@example.org"],
    }
    assert not found.left_out


@pytest.mark.parametrize(
    ("target", "wanted", "rankings"),
    [
        ("comparison", Wanted(responses=("answer2", "answer1")), [[0, 1]]),
        ("answer2,answer1", Wanted(), [[1, 0]]),
        ("answer1, answer2", Wanted(), [[0, 1]]),
    ],
)
def test_which_response_is_left_is_what_the_export_says_or_else_the_command_line(
    target: str, wanted: Wanted, rankings: list[list[int]]
) -> None:
    """Where the result names both texts their order counts; otherwise that of the responses."""
    found = read_all(task(PAIR, annotation(2, pairwise("left", target))), wanted=wanted)
    assert found.as_row()["rankings"] == rankings


def test_cancelled_annotations_drafts_and_empty_ones_are_left_out() -> None:
    """Each kind is counted."""
    found = read_all(
        task(
            PAIR,
            annotation(1, pairwise("left"), was_cancelled=True),
            annotation(2),
            annotation(3, pairwise("right")),
            drafts=[{"id": 1}],
        )
    )
    assert found.as_row()["annotators"] == ["3"]
    assert found.left_out == Counter({"cancelled annotations": 1, "annotations without an answer": 1, "drafts": 1})


def test_of_several_annotations_by_one_person_the_newest_counts() -> None:
    """Wherever it stands in the export."""
    found = read_all(
        task(
            PAIR,
            annotation(1, pairwise("right"), day=3),
            annotation(1, pairwise("left"), day=2),
            annotation(2, pairwise("left"), day=1),
        )
    )
    row = found.as_row()
    assert dict(zip(row["annotators"], row["rankings"], strict=True)) == {"1": [1, 0], "2": [0, 1]}
    assert found.left_out == {"annotations that the same person replaced": 1}


@pytest.mark.parametrize(
    "value", [["llm_3", "llm_1", "llm_2"], {"rank": ["llm_3", "llm_1", "llm_2"]}], ids=["2023", "2025"]
)
def test_a_ranker_without_groups_is_a_ranking(value: Any) -> None:
    """A list of ids from best to worst, lately under the tag's own name."""
    found = read_all(task(ITEMS, annotation(1, ranker(value))))
    assert found.as_row() == {
        "prompt": "Name a colour.",
        "responses": THREE,
        "rankings": [[2, 0, 1]],
        "annotators": ["1"],
    }


def test_numbers_as_ids_are_found_again() -> None:
    """Label Studio keeps ids as texts in a ranking."""
    items = [{"id": number, "body": body} for number, body in enumerate(THREE)]
    found = read_all(task({"prompt": "p", "items": items}, annotation(1, ranker({"rank": ["2", "0"]}))))
    assert found.as_row()["rankings"] == [[2, 0]]


def test_groups_rank_by_the_order_the_command_line_gives() -> None:
    """One group is a tie; a group that is not named was left out, as the column of what nobody sorted."""
    groups = {"_": ["llm_2"], "bad": ["llm_3"], "good": ["llm_1"], "middling": []}
    grouped = task(
        ITEMS, annotation(1, ranker(groups)), annotation(2, ranker(groups | {"_": [], "good": ["llm_1", "llm_2"]}))
    )
    found = read_all(grouped, wanted=Wanted(groups=("good", "middling", "bad")))
    assert found.as_row()["rankings"] == [[0, 2], [[0, 1], 2]]
    assert reason(grouped) == (
        "annotations[0].result[0].value.ranker: sorts into the groups _, bad, good, middling; "
        "say which is best with --groups BEST,WORSE"
    )
    assert "has no group 'best', only _, bad, good, middling" in reason(grouped, wanted=Wanted(groups=("best", "bad")))


def test_ratings_belong_to_the_text_they_were_given() -> None:
    """By the annotated tag, or by the response in the rating's own name; others are counted."""
    found = read_all(
        task(
            PAIR,
            annotation(
                1,
                result("rating", "quality-a", "answer1", rating=4),
                result("rating", "answer2_quality", "view", rating=2),
                result("rating", "difficulty", "prompt", rating=5),
                result("textarea", "why", "prompt", text=["better"]),
            ),
        )
    )
    assert found.as_row() == {
        "prompt": "Name a colour.",
        "responses": ["Blue.", "Seven."],
        "ratings": [[4], [2]],
        "annotators": ["1"],
    }
    assert found.left_out == {
        "answers to difficulty, which compare no responses": 1,
        "answers to why, which compare no responses": 1,
    }


def test_choices_between_two_responses() -> None:
    """A choice is a response, a side or a tie; several at once and others compare nothing."""
    choices = [["answer2"], ["Left"], ["Tie"], ["unsure"], ["answer1", "answer2"], []]
    found = read_all(
        task(
            PAIR,
            *(annotation(who, result("choices", "best", "prompt", choices=one)) for who, one in enumerate(choices)),
        )
    )
    assert found.as_row()["rankings"] == [[1, 0], [0, 1], [[0, 1]]]
    assert found.left_out == {"answers to best, which compare no responses": 3}


def test_the_tasks_data_names_the_models() -> None:
    """As a list, or one by one."""
    for models in (
        {"models": ["x", "y"]},
        {"model_1": "x", "model_2": "y"},
        {"answer1_model": "x", "answer2_model": "y"},
    ):
        assert read_all(task(PAIR | models, annotation(1, pairwise("left")))).as_row()["models"] == ["x", "y"]


def test_json_min_reads_as_json() -> None:
    """A task's annotations are rows of their own there."""
    eve = {"id": 9, "email": "eve@example.org"}
    rows = [
        flat(PAIR, 2, comparison=[{"selected": "right"}]),
        flat(PAIR, "eve@example.org", comparison=[{"selected": "left"}]),
    ]
    nested = task(PAIR, annotation(2, pairwise("right")), annotation(eve, pairwise("left")))
    assert belongs(rows[1], rows[0])
    assert read_all(*rows).as_row() == read_all(nested).as_row()


@pytest.mark.parametrize(
    ("data", "tags", "said"),
    [
        (ITEMS, {"rank": [{"ranker": {"rank": ["llm_2", "llm_1"]}}]}, {"rankings": [[1, 0]]}),
        (ITEMS, {"rank": [{"ranker": ["llm_2", "llm_1"]}]}, {"rankings": [[1, 0]]}),
        (PAIR, {"best": "answer2", "source": "web"}, {"rankings": [[1, 0]]}),
        (
            PAIR,
            {"answer1_quality": [{"rating": 4}], "answer2_quality": [{"rating": 1}]},
            {"ratings": [[4], [1]]},
        ),
    ],
)
def test_every_tag_in_json_min(data: dict[str, Any], tags: dict[str, Any], said: dict[str, Any]) -> None:
    """What is data and no answer is not counted as an answer that was left out."""
    found = read_all(flat(data, 1, **tags))
    row = found.as_row()
    assert {key: row.get(key) for key in said} == said
    assert not found.left_out


def test_a_choice_that_compares_nothing_is_counted_in_json_min_when_asked_for() -> None:
    """Only then it is known to be an answer."""
    found = read_all(flat(PAIR, 1, best="unsure"), wanted=Wanted(questions=("best",)))
    assert found.left_out == {"answers to best, which compare no responses": 1}


def test_only_rows_of_one_task_belong_together() -> None:
    """Tasks of JSON stand alone."""
    first = flat(PAIR, 1)
    assert not belongs(flat(PAIR, 1) | {"id": 2}, first)
    assert not belongs(task(PAIR), task(PAIR))
    assert not belongs({key: value for key, value in first.items() if key != "id"}, first)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (
            task(PAIR, annotation(1, pairwise("both"))),
            "annotations[0].result[0].value.selected: is 'both', and must be left or right",
        ),
        (
            task(ITEMS, annotation(1, pairwise("left"))),
            "annotations[0].result[0]: chooses between left and right, and there are 3 responses",
        ),
        (
            task(ITEMS, annotation(1, ranker(["llm_1", "llm_9"]))),
            "annotations[0].result[0].value.ranker: names 'llm_9', and the responses are llm_1, llm_2, llm_3",
        ),
        (
            task(ITEMS, annotation(1, ranker({"rank": ["llm_1", "llm_1"]}))),
            "annotations[0].result[0].value.ranker: names response llm_1 twice",
        ),
        (
            task(ITEMS, annotation(1, ranker("llm_1"))),
            "annotations[0].result[0].value.ranker: must be a list of ids, or an object of such lists",
        ),
        (
            task(PAIR, annotation(1, result("rating", "quality", "answer1", rating="4"))),
            "annotations[0].result[0].value.rating: must be a number",
        ),
        (
            task(PAIR, annotation(1, result("choices", "best", "prompt", choices="answer1"))),
            "annotations[0].result[0].value.choices: must be a list of texts",
        ),
        (task(PAIR, annotation(1, {"type": "pairwise"})), "annotations[0].result[0].value: must be an object"),
        (task(PAIR, annotation(1) | {"result": None}), "annotations[0].result: must be a list"),
        (
            task(PAIR, annotation(None, pairwise("left"))),
            "annotations[0].completed_by: is missing: export with the details of users",
        ),
        (task(PAIR, annotations={}), "annotations: must be a list"),
        (
            task(PAIR, annotation(1, pairwise("left"), result("choices", "best", "prompt", choices=["answer1"]))),
            "annotator 1 ranks the responses in comparison and in best; say with --question which to take",
        ),
    ],
)
def test_what_label_studio_does_not_write_is_refused_with_its_place(record: dict[str, Any], problem: str) -> None:
    """One reason, in the export's own words."""
    assert reason(record) == problem


@pytest.mark.parametrize(("record", "problem"), [({}, "data: is missing"), ({"data": []}, "data: must be an object")])
def test_a_task_needs_data(record: dict[str, Any], problem: str) -> None:
    """Read as a task because the command line said so."""
    with pytest.raises(MalformedError) as caught:
        fields_of([record])
    assert str(caught.value.reason) == problem
