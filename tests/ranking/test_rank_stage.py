import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.attempt.context import Context
from rlhf.config.data import RankSettings
from rlhf.errors import RecordError
from rlhf.ranking.report import in_words
from rlhf.stages.rank import run

TRAIN: list[dict[str, Any]] = [
    {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [[3, 2, None], [1, 2, 0], [0, -1, 1]]},
    {"prompt": "q", "responses": ["d", "e"], "winners": [[0, 1, 1]], "margin": 2.0},
]
HELDOUT: list[dict[str, Any]] = [{"prompt": "r", "responses": ["f", "g"], "rankings": [[1, 0], [[0, 1]]]}]


def ranked(
    folder: Path, train: list[dict[str, Any]], heldout: list[dict[str, Any]], **settings: Any
) -> Context[RankSettings]:
    for name in ("input", "output", "attempt"):
        (folder / name).mkdir(parents=True)
    for part, rows in (("train", train), ("heldout", heldout)):
        (folder / "input" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Context(
        stage="rank",
        key="0" * 64,
        settings=RankSettings(**settings),
        inputs={"comparisons": folder / "input"},
        output=folder / "output",
        attempt=folder / "attempt",
        cache=folder / "cache",
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_set_is_kept_and_gains_normalised_strengths(tmp_path: Path) -> None:
    """Better rated responses are stronger; training strengths have mean 0 and deviation 1; the metrics count."""
    context = ranked(tmp_path, TRAIN, HELDOUT)
    metrics = run(context)
    train, heldout = rows(context.output / "train.jsonl"), rows(context.output / "heldout.jsonl")
    for before, after in zip(TRAIN + HELDOUT, train + heldout, strict=True):
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) == {"strengths", "standard_errors", "elo", "pool"}
        assert len(after["strengths"]) == len(after["standard_errors"]) == len(before["responses"])
        assert min(after["standard_errors"]) > 0
    strengths = np.concatenate([row["strengths"] for row in train])
    assert strengths.mean() == pytest.approx(0)
    assert strengths.std() == pytest.approx(1)
    assert train[0]["strengths"][0] > train[0]["strengths"][1] > train[0]["strengths"][2]
    assert heldout[0]["strengths"][1] > heldout[0]["strengths"][0]
    scale = json.loads((context.output / "scale.json").read_text())
    assert scale == {
        "model": "bradley-terry",
        "normalise": "dataset",
        "deviation_elo": metrics["deviation_elo"],
        "prior_elo": 200.0,
        "ties": "half",
    }
    np.testing.assert_allclose(train[0]["elo"], np.multiply(train[0]["strengths"], scale["deviation_elo"]))
    assert metrics == {
        "sets": 2,
        "responses": 5,
        "comparisons": 2 * 3 + 1 + 1,
        "tie_share": 1 / 8,
        "deviation_elo": scale["deviation_elo"],
        "agreement": json.loads((context.output / "report.json").read_text())["krippendorff_alpha"],
    }
    assert not (context.output / "leaderboard.json").exists()


def test_held_out_sets_do_not_change_the_training_strengths(tmp_path: Path) -> None:
    """Nothing leaks from what is held out, which may also be empty."""
    one, other = ranked(tmp_path / "one", TRAIN, HELDOUT), ranked(tmp_path / "other", TRAIN, [])
    run(one)
    run(other)
    assert (one.output / "train.jsonl").read_bytes() == (other.output / "train.jsonl").read_bytes()
    assert (other.output / "heldout.jsonl").read_bytes() == b""


def test_the_order_of_sets_and_annotators_changes_no_strength(tmp_path: Path) -> None:
    """Bradley-Terry, unlike Elo's running update, has no order."""
    permuted = TRAIN[0] | {"ratings": [row[::-1] for row in TRAIN[0]["ratings"]]}
    one, other = ranked(tmp_path / "one", TRAIN, []), ranked(tmp_path / "other", [TRAIN[1], permuted], [])
    run(one)
    run(other)
    first, second = rows(one.output / "train.jsonl"), rows(other.output / "train.jsonl")[::-1]
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a["strengths"], b["strengths"], atol=1e-9)


def test_rated_sets_with_one_prompt_share_a_pool_and_a_scale(tmp_path: Path) -> None:
    """Sets of good and of bad responses come out above and below 0; a ranked one beside them keeps to itself."""
    good = {"prompt": "p", "responses": ["a", "b"], "ratings": [[4, 3, 4], [3, 3, 2]]}
    bad = {"prompt": "p", "responses": ["c", "d"], "ratings": [[-4, -3, -3], [-2, -3, -4]]}
    alone = {"prompt": "p", "responses": ["e", "f"], "rankings": [[0, 1]]}
    context = ranked(tmp_path, [good, bad, alone], [])
    run(context)
    first, second, third = rows(context.output / "train.jsonl")
    assert first["pool"] == second["pool"] != third["pool"]
    assert min(first["strengths"]) > 0 > max(second["strengths"])
    assert sum(first["strengths"] + second["strengths"]) == pytest.approx(0, abs=1e-9)
    assert sum(third["strengths"]) == pytest.approx(0, abs=1e-9)


def test_models_give_a_leaderboard_in_order_of_strength(tmp_path: Path) -> None:
    """Wins are pooled over sets, so that a model that won everywhere comes first."""
    models = [["x", "y", "z"], ["x", "z"]]
    context = ranked(tmp_path, [row | {"models": names} for row, names in zip(TRAIN, models, strict=True)], [])
    run(context)
    board = json.loads((context.output / "leaderboard.json").read_text())
    assert [row["model"] for row in board] == ["x", "y", "z"]
    assert [row["comparisons"] for row in board] == [5, 5, 6]
    assert board[0]["elo"] > board[1]["elo"] > board[2]["elo"]


@pytest.mark.parametrize(("ties", "least"), [("rao-kupper", 1), ("davidson", 0)])
def test_the_parameter_of_ties_is_the_training_part_s(tmp_path: Path, ties: str, least: float) -> None:
    """It grows with the share of ties, and what is held out is seen with it and does not change it."""
    tied = {"prompt": "p", "responses": ["a", "b"], "winners": [[0, 1, 0.5]] * 9 + [[0, 1, 1]] * 2}

    def run_on(name: str, train: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> Context[RankSettings]:
        context = ranked(tmp_path / name, train, heldout, ties=ties)
        run(context)
        return context

    def parameter(context: Context[RankSettings]) -> float:
        return json.loads((context.output / "scale.json").read_text())["tie_parameter"]

    few, many = run_on("few", TRAIN, [tied]), run_on("many", [*TRAIN, tied], [tied])
    assert least < parameter(few) < parameter(many)
    assert parameter(run_on("alone", TRAIN, [])) == parameter(few)
    one, other = (rows(context.output / "heldout.jsonl")[0]["strengths"] for context in (few, many))
    assert one != other


def test_annotators_are_known_across_sets_by_their_names(tmp_path: Path) -> None:
    """One who reverses every ranking and rating comes first in the list; without names each set has its own."""
    rng = np.random.default_rng(0)
    sets: list[dict[str, Any]] = []
    for index in range(40):
        quality = rng.normal(0, 2, 4)
        ratings = quality[:, None] + rng.normal(0, 0.5, (4, 3))
        ratings[:, 1] *= -1
        one: dict[str, Any] = {"prompt": f"p{index}", "responses": ["a", "b", "c", "d"]}
        if index % 2:
            one["ratings"] = ratings.tolist()
        else:
            one["rankings"] = np.argsort(-ratings, axis=0).T.tolist()
        sets.append(one)
    names = ["honest", "reversed", "fair"]
    named = ranked(tmp_path / "named", [one | {"annotators": names} for one in sets], [], annotators="reliability")
    run(named)
    listed = json.loads((named.output / "annotators.json").read_text())
    assert listed[0]["name"] == "reversed"
    assert listed[0]["reliability"] < 0.2 < 0.8 < listed[1]["reliability"] <= listed[2]["reliability"]
    assert [row["comparisons"] for row in listed] == [240, 240, 240]

    unnamed = ranked(tmp_path / "unnamed", sets, [], annotators="reliability")
    run(unnamed)
    listed = json.loads((unnamed.output / "annotators.json").read_text())
    assert len(listed) == 40 * 3
    assert "train.jsonl:1, annotator 0" in {row["name"] for row in listed}

    equal = ranked(tmp_path / "equal", sets, [])
    run(equal)
    assert not (equal.output / "annotators.json").exists()


def test_reliability_without_annotators_is_an_error(tmp_path: Path) -> None:
    """Winners are nobody's: there is nobody whose reliability could be found."""
    with pytest.raises(RecordError, match="no annotator"):
        run(ranked(tmp_path, TRAIN[1:], [], annotators="reliability"))


def test_annotators_who_prefer_nothing_are_an_error(tmp_path: Path) -> None:
    """Dividing by a deviation of 0 must not reach the reward model as NaN."""
    tied = {"prompt": "p", "responses": ["a", "b"], "ratings": [[1, 1], [1, 1]]}
    with pytest.raises(RecordError, match="nothing to learn"):
        run(ranked(tmp_path, [tied], []))


@pytest.mark.parametrize("model", ["bradley-terry", "plackett-luce", "elo"])
def test_every_model_puts_the_better_rated_first(tmp_path: Path, model: str) -> None:
    """On what all annotators agree about, whatever kind of record it is; winners count in each."""
    sets: list[dict[str, Any]] = [
        {"prompt": "p", "responses": ["a", "b", "c"], "ratings": [[1, 1], [3, 3], [2, 2]]},
        {"prompt": "q", "responses": ["a", "b", "c"], "rankings": [[1, 2, 0], [1, [2, 0]]]},
        {"prompt": "r", "responses": ["a", "b"], "winners": [[1, 0, 1], [1, 0, 1], [0, 1, 0.5]]},
    ]
    context = ranked(tmp_path, sets, sets[:1], model=model)
    run(context)
    for row in rows(context.output / "train.jsonl") + rows(context.output / "heldout.jsonl"):
        assert int(np.argmax(row["strengths"])) == 1
        assert min(row["standard_errors"]) > 0
    assert json.loads((context.output / "scale.json").read_text())["model"] == model


def test_strengths_come_on_the_scale_that_is_asked_for(tmp_path: Path) -> None:
    """Each keeps the order; a prompt's own deviation, an annotator's own, and probabilities."""
    rng = np.random.default_rng(0)
    sets: list[dict[str, Any]] = []
    for number in range(6):
        quality = rng.normal(0, 0.3 if number % 2 else 3.0, 4)
        ratings = quality[:, None] + rng.normal(0, 1, (4, 5))
        sets.append({"prompt": f"p{number}", "responses": list("abcd"), "ratings": ratings.tolist()})
        sets[-1]["annotators"] = list("vwxyz")

    def strengths(how: str) -> list[Any]:
        context = ranked(tmp_path / how, sets, [], normalise=how)
        run(context)
        found = rows(context.output / "train.jsonl")
        for row in found:
            order = np.argsort(row["elo"])
            rises, elo_rises = (np.diff(np.array(row[name])[order]) for name in ("strengths", "elo"))
            # Two who won alike have one Elo but for rounding, which differs between machines.
            apart = elo_rises > 1e-9
            assert apart.sum() > 1
            assert (rises[apart] > 0).all()
            assert rises[~apart] == pytest.approx(0)
        return [np.array(row["strengths"]) for row in found]

    dataset, prompt, probability = (strengths(how) for how in ("dataset", "prompt", "probability"))
    assert np.concatenate(dataset).std() == pytest.approx(1)
    assert [one.std() for one in prompt] == pytest.approx([1] * 6)
    assert min(one.std() for one in dataset) < 0.9
    together = np.concatenate(probability)
    assert 0 < together.min() < 0.5 < together.max() < 1
    annotator = strengths("annotator")
    assert np.concatenate(annotator).std() == pytest.approx(1)
    assert np.corrcoef(np.concatenate(annotator), np.concatenate(dataset))[0, 1] > 0.9


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_annotators_of_different_responses_cannot_be_normalised_each_alone(tmp_path: Path, part: str) -> None:
    """All who saw two agree that a > b > c > d, and the mean of what each says alone would put c above b."""
    ratings = [[4.0] * 10 + [None] * 15, [3.0] * 10 + [None] * 10 + [3.0] * 5, [None] * 10 + [2.0] * 15]
    ratings.append([None] * 10 + [1.0] * 10 + [None] * 5)
    names = [f"person {number}" for number in range(25)]
    windows = {"prompt": "p", "responses": list("abcd"), "ratings": ratings, "annotators": names}
    whole = {"prompt": "q", "responses": ["a", "b"], "ratings": [[2], [1]]}
    parts: dict[str, list[dict[str, Any]]] = {"train": [whole], "heldout": []} | {part: [windows]}
    with pytest.raises(RecordError, match=r"annotator.* person 0, .*person 4 and 20 more") as caught:
        run(ranked(tmp_path / "refused", parts["train"], parts["heldout"], normalise="annotator"))
    assert caught.value.where == f"{part}.jsonl"
    assert "rank.normalise=dataset" in caught.value.next_step
    context = ranked(tmp_path / "said", parts["train"], parts["heldout"])
    run(context)
    strengths = rows(context.output / f"{part}.jsonl")[0]["strengths"]
    assert strengths == sorted(strengths, reverse=True)


def test_bridged_sets_are_refused_where_each_annotator_is_normalised_alone(tmp_path: Path) -> None:
    """Nobody rated both sets, so that an annotator's own mean of 0 would level a good set with a bad one."""
    sets = [
        {"prompt": "p", "responses": ["a", "b"], "ratings": [[4, 3], [3, 2]]},
        {"prompt": "p", "responses": ["c", "d"], "ratings": [[-3, -3], [-4, -2]]},
    ]
    with pytest.raises(RecordError, match=r"train\.jsonl:1, annotator 0") as caught:
        run(ranked(tmp_path / "bridged", sets, [], normalise="annotator"))
    assert "rank.bridges=0" in caught.value.next_step
    run(ranked(tmp_path / "apart", sets, [], normalise="annotator", bridges=0))


def test_a_set_too_large_to_compare_is_refused_by_place(tmp_path: Path) -> None:
    """Ten thousand responses make fifty million pairs for each annotator; as winners they are welcome."""
    count = 10_000
    huge: dict[str, Any] = {"prompt": "p", "responses": [str(n) for n in range(count)]}
    with pytest.raises(RecordError, match="10000 responses") as caught:
        run(ranked(tmp_path / "rated", [huge | {"ratings": [[float(n)] for n in range(count)]}], []))
    assert caught.value.where == "train.jsonl:1"
    context = ranked(tmp_path / "won", [huge | {"winners": [[n, n + 1, 1] for n in range(count - 1)]}], [])
    run(context)
    strengths = rows(context.output / "train.jsonl")[0]["strengths"]
    assert strengths[0] > strengths[5000] > strengths[-1]


def test_what_the_report_says_is_noted_and_written(tmp_path: Path) -> None:
    """In words for who reads the log, in numbers for who reads the result."""
    context = ranked(tmp_path, [TRAIN[0], TRAIN[0]], HELDOUT)
    run(context)
    notes = [json.loads(line)["note"] for line in (context.attempt / "notes.jsonl").read_text().splitlines()]
    found = json.loads((context.output / "report.json").read_text())
    assert notes == in_words(found)
    assert notes[-1] == "1 repeated sets"


def test_annotators_are_listed_who_compared_anything_at_all(tmp_path: Path) -> None:
    """One comparison is enough, and a lone rating is none."""
    ratings = [[1.0, 2.0, None], [2.0, None, 1.0], [0.0, 3.0, None]]
    one: dict[str, Any] = {"prompt": "p", "responses": ["a", "b", "c"], "ratings": ratings}
    context = ranked(tmp_path, [one | {"annotators": ["three", "once", "never"]}], [], annotators="reliability")
    run(context)
    listed = json.loads((context.output / "annotators.json").read_text())
    assert {row["name"]: row["comparisons"] for row in listed} == {"three": 3, "once": 1}


@pytest.mark.parametrize(("count", "said"), [(5, "n 3, n 4 compared"), (6, "n 3, n 4 and 1 more compared")])
def test_five_annotators_are_named_and_more_are_counted(tmp_path: Path, count: int, said: str) -> None:
    """Of those who compared a part."""
    rows = [[1.0] * count + [1.0], [2.0] * count + [2.0], [None] * count + [3.0]]
    names = [*(f"n {number}" for number in range(count)), "whole"]
    one: dict[str, Any] = {"prompt": "p", "responses": ["a", "b", "c"], "ratings": rows, "annotators": names}
    with pytest.raises(RecordError, match=said):
        run(ranked(tmp_path, [one], [], normalise="annotator"))


def test_a_leaderboard_is_of_the_sets_that_name_their_models(tmp_path: Path) -> None:
    """Others beside them count for strengths alone."""
    context = ranked(tmp_path, [TRAIN[0], TRAIN[1] | {"models": ["x", "y"]}], [])
    run(context)
    board = json.loads((context.output / "leaderboard.json").read_text())
    assert [(row["model"], row["comparisons"]) for row in board] == [("x", 1), ("y", 1)]


def test_votes_count_once_whatever_the_weight_and_tasks_share_no_pool(tmp_path: Path) -> None:
    """Weights change no strength; ratings of a prompt that two tasks share are not compared across them."""
    sets = [
        {"prompt": "p", "responses": [f"{number}a", f"{number}b"], "ratings": [[3 - number, 2], [1, 2 * number]]}
        for number in range(4)
    ]
    found: dict[float, list[dict[str, Any]]] = {}
    for weight in (1.0, 3.0):
        train = [row | {"task": "xy"[number % 2], "weight": weight} for number, row in enumerate(sets)]
        context = ranked(tmp_path / f"{weight}", train, [sets[0] | {"task": "x"}])
        assert run(context)["comparisons"] == pytest.approx(run_alone(tmp_path / f"{weight}-alone", sets, "x", "y"))
        found[weight] = rows(context.output / "train.jsonl")
        assert [row.pop("weight") for row in found[weight]] == [weight] * 4
        assert [row["task"] for row in found[weight]] == [*"xyxy"]
        assert [row["pool"] for row in found[weight]] == [0, 1, 0, 1]
    assert found[1.0] == found[3.0]


def run_alone(folder: Path, sets: list[dict[str, Any]], *tasks: str) -> float:
    """Comparisons of the tasks, each ranked by itself."""
    return sum(run(ranked(folder / task, sets[place::2], []))["comparisons"] for place, task in enumerate(tasks))
