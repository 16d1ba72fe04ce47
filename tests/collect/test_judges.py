from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.attempt.context import Context
from rlhf.collect.collection import Collection
from rlhf.collect.judges import judge_of
from rlhf.config.base import semantic_values
from rlhf.config.collect import CollectSettings, CompareSettings, WriterSettings, awaited, writer_inputs
from rlhf.data.records import ComparisonSet, ResponseSet, read_jsonl, write_jsonl
from rlhf.errors import PreflightError, RecordError, RewardError
from rlhf.stages import compare

SETS = [
    ResponseSet(prompt="p", responses=["a", "bb", "ccc"], models=["x", "y", "z"]),
    ResponseSet(prompt="q", responses=["a", "bb"], models=["x", "y"]),
]


def compared(settings: CompareSettings, attempt: Path) -> list[ComparisonSet]:
    context = Context("compare", "key", settings, {}, attempt, attempt, attempt, attempts=(attempt,))
    judge = judge_of(settings)
    return list(judge.compare(SETS, context))


def function(folder: Path, body: str) -> CompareSettings:
    file = folder / "mine.py"
    file.write_text(f"def judge(prompt, responses):\n    {body}\n")
    return CompareSettings(function=f"{file}:judge")


def test_a_function_s_numbers_become_ratings(tmp_path: Path) -> None:
    """All responses of a prompt at once, so that they may be compared; the function is the annotator."""
    found = compared(function(tmp_path, "return [len(response) for response in responses]"), tmp_path)
    assert [one.ratings for one in found] == [[[1], [2], [3]], [[1], [2]]]
    assert [one.annotators for one in found] == [["judge"], ["judge"]]
    assert [one.models for one in found] == [["x", "y", "z"], ["x", "y"]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"the judge answered 1 scores for 3 responses"),
        ("return [float('nan')] * len(responses)", "the judge's score of response 0 is nan"),
        ("raise KeyError('k')", "the judge raised KeyError"),
        ("raise ValueError('a\\nb \\ud800')", r"the judge raised ValueError: a b \\ud800"),
    ],
)
def test_a_function_that_does_not_judge_is_told_of_by_the_set(tmp_path: Path, body: str, message: str) -> None:
    """No preference is made up."""
    with pytest.raises(RewardError, match=message) as caught:
        compared(function(tmp_path, body), tmp_path)
    assert "mine.py:judge, set 1" in caught.value.where


def test_a_function_that_is_not_there_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """The preflight loads it, before any model writes."""
    with pytest.raises(PreflightError, match=r"has no function other"):
        judge_of(CompareSettings(function=function(tmp_path, "return []").function.replace(":judge", ":other")))  # type: ignore[union-attr]


def test_what_people_said_is_found_again_by_its_content(tmp_path: Path) -> None:
    """As `rlhf annotate` writes it, in any order; rows nobody ranked are left out; models come from the sets."""
    source, out = tmp_path / "responses.jsonl", tmp_path / "said.jsonl"
    write_jsonl(source, [one.model_copy(update={"models": None}) for one in reversed(SETS)])
    with Collection(str(source), out) as collection:
        row = next(name for name, one in collection.annotation.sets.items() if one.prompt == "p")
        collection.answer("ann", row, [2, [0, 1]], 0)
        collection.export()
    found = compared(CompareSettings(file=str(out)), tmp_path)
    assert [one.prompt for one in found] == ["p"]
    assert found[0].models == ["x", "y", "z"]
    assert found[0].annotators == ["ann"]


def test_a_file_about_other_responses_is_refused(tmp_path: Path) -> None:
    """It would silently leave every set out."""
    other = tmp_path / "other.jsonl"
    write_jsonl(other, [ComparisonSet(prompt="p", responses=["a", "other"], winners=[[0, 1, 1]])])
    (tmp_path / "responses").mkdir()
    for part in ("train", "heldout"):
        write_jsonl(tmp_path / "responses" / f"{part}.jsonl", SETS)
    inputs = {"responses": tmp_path / "responses"}
    settings = CompareSettings(file=str(other))
    with pytest.raises(RecordError, match="no judgement compares any of the collected responses"):
        compare.run(Context("compare", "key", settings, inputs, tmp_path, tmp_path, tmp_path, attempts=(tmp_path,)))


def test_the_stage_counts_what_is_compared_and_what_is_left_out(tmp_path: Path) -> None:
    """By part; each part's sets stay in it, and the user hears of sets without a judgement."""
    said = tmp_path / "said.jsonl"
    rows = [SETS[1].model_copy(update={"prompt": prompt}) for prompt in ("p0", "p1", "p2", "p3", "p4")]
    write_jsonl(
        said, [ComparisonSet(prompt=rows[n].prompt, responses=rows[n].responses, rankings=[[0, 1]]) for n in (0, 1, 3)]
    )
    (tmp_path / "responses").mkdir()
    write_jsonl(tmp_path / "responses" / "train.jsonl", rows[:3])
    write_jsonl(tmp_path / "responses" / "heldout.jsonl", rows[3:])
    inputs = {"responses": tmp_path / "responses"}

    def run(settings: CompareSettings) -> dict[str, float]:
        return compare.run(Context("compare", "key", settings, inputs, tmp_path, tmp_path, tmp_path, (tmp_path,)))

    assert run(CompareSettings(file=str(said))) == {"train": 2, "heldout": 1, "left_out": 2}
    for part, prompts in (("train", ["p0", "p1"]), ("heldout", ["p3"])):
        assert [one.prompt for one in read_jsonl(tmp_path / f"{part}.jsonl", ComparisonSet)] == prompts
    notes = tmp_path / "notes.jsonl"
    assert "2 sets are left out, because no judgement compares them" in notes.read_text()
    notes.unlink()
    judge = function(tmp_path, "return [len(response) for response in responses]")
    assert run(judge) == {"train": 3, "heldout": 2, "left_out": 0}
    assert not notes.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "there is none of them"),
        ({"file": "a.jsonl", "function": "f.py:f"}, "there is file and function"),
        ({"function": "f"}, "not of the form file.py:name"),
    ],
)
def test_one_judge_is_named(values: dict[str, Any], message: str) -> None:
    """Neither none nor two."""
    with pytest.raises(ValidationError, match=message):
        CompareSettings(**values)


def test_a_file_that_people_have_still_to_write_is_waited_for(tmp_path: Path) -> None:
    """Once it is there, its content and not its place is in the key."""
    settings = CompareSettings(file=str(tmp_path / "said.jsonl"))
    assert awaited(settings) == tmp_path / "said.jsonl"
    (tmp_path / "said.jsonl").touch()
    assert awaited(settings) is None
    assert semantic_values(settings)["file"] == "file"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([{"model": "sft"}], "nothing to compare it with"),
        ([{"model": "sft"}, {"model": "sft"}], "two models are called 'sft'"),
        ([{"model": "a", "name": "n"}, {"model": "b", "name": "n"}], "two models are called 'n'"),
    ],
)
def test_sets_that_could_not_be_compared_are_refused(models: list[dict[str, Any]], message: str) -> None:
    """Before anything is written."""
    with pytest.raises(ValidationError, match=message):
        CollectSettings(models=[WriterSettings(**one) for one in models])


def test_a_model_that_writes_at_two_temperatures_is_one_input() -> None:
    """It is called by both temperatures, and loaded from one artifact."""
    models = [WriterSettings(model="sft", temperature=0.5), WriterSettings(model="ppo"), WriterSettings(model="sft")]
    settings = CollectSettings(models=models)
    assert [writer.shown for writer in settings.models] == ["sft at 0.5", "ppo", "sft"]
    assert writer_inputs(settings) == {"model": "sft", "model_2": "ppo"}
