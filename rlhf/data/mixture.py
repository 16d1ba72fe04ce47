"""Several tasks in one file of records: which rows make an epoch, and how files of the tasks become one."""

import heapq
import json
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf.config.data import TaskSource
from rlhf.data.split import Split
from rlhf.errors import RecordError
from rlhf.randomness import stream

IntArray = npt.NDArray[np.int64]


def rows_an_epoch(count: int, weight: float, task: str) -> int:
    """Return the number of rows that an epoch has of a task with ``count`` records.

    Raises RecordError where there is none.
    """
    rows = round(count * weight)
    if rows == 0:
        raise RecordError(
            f"nothing of the task {task} would be trained on: weight {weight:g} of its {count} records rounds to none",
            f"task {task}",
            "raise its weight, or leave the task out",
        )
    return rows


class Mixture:
    """The epochs of rows that may belong to tasks: each record counts by its task's weight.

    An epoch has round(weight · records) rows of each task, in which no record occurs more than once more often than
    another of its task. The next epoch goes on where it ended: with weight 0.5 it has the other half.

    rows  with ``task`` and ``weight``; without ``weight`` they count once
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._members: defaultdict[tuple[str, float], list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            self._members[row.get("task", ""), row.get("weight", 1.0)].append(number)
        self._counts = [rows_an_epoch(len(numbers), weight, task) for (task, weight), numbers in self._members.items()]
        self.size = sum(self._counts)
        """Rows of an epoch."""

    def epoch(self, seed: int, number: int = 0) -> IntArray:
        """Return the rows of an epoch, counted from 0, with the tasks spread evenly; rows without tasks in order."""
        if not any(task for task, _ in self._members):
            return np.arange(self.size)
        rows, places = list[IntArray](), list[npt.NDArray[np.float64]]()
        for index, (members, count) in enumerate(zip(self._members.values(), self._counts, strict=True)):
            order = np.asarray(members)[stream("mixture", seed, index).permutation(len(members))]
            rows.append(order[(number * count + np.arange(count)) % len(members)])
            places.append((np.arange(count) + 0.5) / count)
        return np.concatenate(rows)[np.argsort(np.concatenate(places), kind="stable")]


def by_task(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the numbers of each task's rows, by its name; rows without a task are in none."""
    tasks: defaultdict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if "task" in row:
            tasks[row["task"]].append(number)
    return dict(tasks)


def join(folder: Path, tasks: Sequence[TaskSource], splits: Sequence[Split]) -> Split:
    """Join the parts in the folders of the tasks, which go, to parts of the folder itself.

    A row then names its ``task``, and in ``train.jsonl`` its ``weight``. Tasks are spread evenly, so that the first
    rows of a file, which are all that some stages read, are of all tasks.

    Raises RecordError where nothing of a task would be trained on.
    """
    parts: dict[str, array[int]] = {}
    for part in ("train", "heldout"):
        parts[part] = array("Q")
        with (folder / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for _, _, digest, row in heapq.merge(
                *(_placed(folder, part, task, getattr(split, part)) for task, split in zip(tasks, splits, strict=True))
            ):
                parts[part].append(digest)
                file.write(row)
    return Split(parts["train"], parts["heldout"])


def _placed(folder: Path, part: str, task: TaskSource, digests: Sequence[int]) -> Iterator[tuple[float, str, int, str]]:
    """Yield a task's rows with their places in the part, from 0 to 1."""
    assert task.task is not None
    fields: dict[str, Any] = {"task": task.task}
    if part == "train":
        fields["weight"] = task.weight
        rows_an_epoch(len(digests), task.weight, task.task)
    file = folder / task.task / f"{part}.jsonl"
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, (digest, line) in enumerate(zip(digests, lines, strict=True)):
            row = json.dumps(json.loads(line) | fields, ensure_ascii=False) + "\n"
            yield (number + 0.5) / len(digests), task.task, digest, row
