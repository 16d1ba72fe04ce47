"""Several tasks in one kind of records: how often each is trained on, and what of each is held out."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.data import DataSettings
from rlhf.data.mixture import Mixture, by_task
from rlhf.data.records import read_rows
from rlhf.errors import RecordError
from rlhf.stages.data import run
from tests.data.test_data_stage import context_for, files_of

tasks = st.lists(st.tuples(st.integers(1, 12), st.sampled_from([0.5, 0.7, 1.0, 1.5, 2.0, 3.0])), min_size=1, max_size=3)


def rows_of(tasks: list[tuple[int, float]]) -> list[dict[str, Any]]:
    """Rows of tasks in turn, as many of each and of such a weight."""
    named = [
        {"task": f"t{number}", "weight": weight}
        for number, (count, weight) in enumerate(tasks)
        if round(count * weight)
        for _ in range(count)
    ]
    return named[::2] + named[1::2]


@given(tasks, st.integers(0, 5), st.integers(1, 4))
def test_over_any_epochs_a_record_counts_as_its_weight_says(
    tasks: list[tuple[int, float]], seed: int, epochs: int
) -> None:
    """A task has round(weight x records) rows an epoch, shared out among its records as evenly as whole numbers can."""
    rows = rows_of(tasks)
    mixture = Mixture(rows)
    drawn = Counter(int(row) for number in range(epochs) for row in mixture.epoch(seed, number))
    for members in by_task(rows).values():
        total = epochs * round(len(members) * rows[members[0]]["weight"])
        counts = [drawn[row] for row in members]
        assert sum(counts) == total
        assert {*counts} <= {total // len(members), -(-total // len(members))}
    assert len(mixture.epoch(seed)) == mixture.size == sum(drawn.values()) // epochs


def test_a_weight_of_a_half_takes_one_half_and_then_the_other() -> None:
    """By the seed, so that nothing is left out for ever."""
    mixture = Mixture([{"task": "a", "weight": 0.5}] * 10)
    first, second, third = ({*mixture.epoch(0, number).tolist()} for number in range(3))
    assert len(first) == len(second) == 5
    assert not first & second
    assert first == third
    assert any({*mixture.epoch(seed).tolist()} != first for seed in range(1, 4))


def test_the_start_of_an_epoch_is_of_all_tasks() -> None:
    """Texts that are packed together come from a stretch of an epoch."""
    rows = rows_of([(40, 1.0), (10, 2.0)])
    shares = Counter(rows[int(row)]["task"] for row in Mixture(rows).epoch(0)[:15])
    assert shares == {"t0": 10, "t1": 5}


def test_rows_without_tasks_are_an_epoch_in_their_order() -> None:
    """As if there were no mixture."""
    assert np.array_equal(Mixture([{}] * 7).epoch(3, 2), np.arange(7))


def test_a_task_of_which_nothing_would_be_trained_on_is_refused(tmp_path: Path) -> None:
    """By name, in the data stage already."""
    with pytest.raises(RecordError, match=r"task b would be trained on: weight 0\.02 of its 18 records"):
        run(context_for(tmp_path, **mixed(tmp_path, weight=0.02)))


def mixed(folder: Path, **of_b: Any) -> dict[str, Any]:
    """Settings of two tasks with other prompts, 40 records and 20, of every kind."""
    written: dict[str, Any] = {}
    for kind, fields in (
        ("demonstrations", {"completion": "c"}),
        ("comparisons", {"chosen": "a", "rejected": "b"}),
        ("prompts", {}),
    ):
        written[kind] = {}
        for task, count, more in (("b", 20, of_b), ("a", 40, {})):
            file = folder / f"{kind}-{task}.jsonl"
            file.write_text("".join(json.dumps({"prompt": f"{task}{n}"} | fields) + "\n" for n in range(count)))
            written[kind][task] = {"source": str(file)} | more
    return {"judge": None, "heldout_fraction": 0.1} | written


def test_each_task_is_split_as_it_would_be_alone(tmp_path: Path) -> None:
    """The same records are held out, rows name their task, and a weight changes no record and nothing held out."""
    settings = mixed(tmp_path, weight=3)
    metrics = run(whole := context_for(tmp_path / "whole", **settings))
    for task in "ab":
        alone = {kind: settings[kind][task]["source"] for kind in ("demonstrations", "comparisons", "prompts")}
        run(context := context_for(tmp_path / task, judge=None, heldout_fraction=0.1, **alone))
        for file in context.output.glob("*/*.jsonl"):
            name = file.relative_to(context.output)
            rows = [row for row in read_rows(whole.output / name) if row["task"] == task]
            weights = {row.pop("weight", None) for row in rows}
            assert weights == ({1.0 if task == "a" else 3.0} if name.name == "train.jsonl" else {None})
            assert [{key: value for key, value in row.items() if key != "task"} for row in rows] == read_rows(file)
            assert metrics[f"{name.parent}/{name.stem}/{task}"] == len(rows) > 0
    assert metrics["prompts/train"] == 54
    first = Counter(row["task"] for row in read_rows(whole.output / "prompts" / "train.jsonl")[:6])
    assert first == {"a": 4, "b": 2}
    assert not [path for path in whole.output.glob("*/*") if path.is_dir()]


def test_the_order_of_the_section_changes_nothing(tmp_path: Path) -> None:
    """A key does not tell it."""
    settings = mixed(tmp_path)
    turned = {
        name: dict(reversed(value.items())) if isinstance(value, dict) else value for name, value in settings.items()
    }
    for name, written in (("one", settings), ("other", turned)):
        run(context_for(tmp_path / name, **written))
    assert files_of(tmp_path / "one" / "output") == files_of(tmp_path / "other" / "output")


def test_snippets_and_records_held_out_by_hand_are_tasks_too(tmp_path: Path, sdist: Path) -> None:
    """Both collections beside each other, and a source with held-out records of its own."""
    settings = mixed(tmp_path)
    settings["comparisons"] = {"movies": {"source": "movie-snippets"}, "goods": {"source": "other-snippets"}}
    held = {task: settings["prompts"][task]["source"] for task in "ab"}
    metrics = run(context := context_for(tmp_path / "c", downloads=sdist.parent, heldout={"prompts": held}, **settings))
    for part in ("train", "heldout"):
        rows = read_rows(context.output / "comparisons" / f"{part}.jsonl")
        prompts = {task: {rows[number]["prompt"] for number in numbers} for task, numbers in by_task(rows).items()}
        assert len(prompts["movies"]) == 1
        assert len(prompts["goods"]) == 2
    assert metrics["prompts/train"] == metrics["prompts/heldout"] == metrics["prompts/heldout_seen"] == 60
    origins = json.loads((context.output / "sources" / "sources.json").read_text())
    assert origins["prompts"]["tasks"] == {task: {"source": "file", "weight": 1.0, "heldout": "file"} for task in "ab"}
    assert str(tmp_path) not in json.dumps(origins)
    assert isinstance(context.settings, DataSettings)
