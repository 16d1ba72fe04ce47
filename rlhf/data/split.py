"""Hold records out: by prompt, by the group that rows name, or by their answers where all share one prompt."""

import hashlib
import json
import unicodedata
from array import array
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from rlhf.data.records import ComparisonSet, Demonstration, Prompt, to_line

Record = Demonstration | ComparisonSet | Prompt


class Split(NamedTuple):
    """The rows of each part, as digests of their prompts, in the order of the files."""

    train: Sequence[int]
    heldout: Sequence[int]
    note: str = ""
    """How rows were held out, unless by prompt."""


def write_split(
    folder: Path, records: Iterable[Record], fraction: float, seed: int, trained: Container[int] = frozenset[int]()
) -> Split:
    """Write ``train.jsonl`` and ``heldout.jsonl``, the latter with a seeded ``fraction`` of the distinct units.

    A unit is never in both parts. It is the group that a row names, else the row's prompt by its :func:`prompt_digest`.
    Where all rows are one unit by this, rows of different units share no response (or completion) instead. The units
    with the smallest digests of seed and unit are held out, so neither the order of the rows nor the frequency of a
    prompt decides. Of two or more units each part has at least one, unless ``fraction`` is 0; a single one is not held
    out. Memory holds 16 bytes a row and one number a distinct unit.

    trained  digests of prompts that are trained on elsewhere: units with one of them are held out only where there is
             no other
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = folder / "everything.jsonl"
    prompts, units = array("Q"), array("Q")
    grouped = False
    with everything.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            prompts.append(prompt_digest(record.prompt))
            units.append(_digest(seed, prompts[-1] if record.group is None else record.group))
            grouped |= record.group is not None
            file.write(to_line(record))
    note = "held out by the groups that rows name" if grouped else ""
    if fraction and len(units) > 1 and len(set(units)) == 1:
        units = _connected(everything, seed)
        count = len(set(units))
        note = f"all rows share one prompt, so rows are held out that share no response with others: {count} groups"
        if count == 1:
            note = "all rows share one prompt, and their responses join them, so nothing is held out"

    distinct = sorted(set(units))
    seen = {unit for unit, prompt in zip(units, prompts, strict=True) if prompt in trained}
    eligible = [unit for unit in distinct if unit not in seen] or distinct
    share = min(max(1, round(fraction * len(distinct))), len(distinct) - 1, len(eligible)) if fraction else 0
    heldout = set(eligible[:share])
    parts: tuple[array[int], array[int]] = array("Q"), array("Q")
    with (
        everything.open(encoding="utf-8", newline="\n") as rows,
        (folder / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train_file,
        (folder / "heldout.jsonl").open("w", encoding="utf-8", newline="\n") as heldout_file,
    ):
        for unit, prompt, row in zip(units, prompts, rows, strict=True):
            (heldout_file if unit in heldout else train_file).write(row)
            parts[unit in heldout].append(prompt)
    everything.unlink()
    return Split(*parts, note)


def write_part(file: Path, records: Iterable[Record]) -> Sequence[int]:
    """Write all the records as a part, and return the digests of their prompts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    prompts = array("Q")
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        for record in records:
            prompts.append(prompt_digest(record.prompt))
            lines.write(to_line(record))
    return prompts


def prompt_digest(prompt: Any) -> int:
    """Return a number that is equal for prompts that differ only in letter case and the white space around them.

    A text equals a user's message of it, and texts are equal however Unicode composes their letters.
    """
    messages = [("user", prompt)] if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]
    return _digest([(role, unicodedata.normalize("NFC", text.strip()).casefold()) for role, text in messages])


def _connected(file: Path, seed: int) -> "array[int]":
    """Return each row's unit, the smallest digest of its responses, where rows with a response in common are joined.

    A row answers with its responses or its completion; of a prompt alone the prompt counts.
    """
    numbers: dict[int, int] = {}
    row_of, answer_of = array("q"), array("q")
    with file.open(encoding="utf-8", newline="\n") as rows:
        for number, row in enumerate(rows):
            fields = json.loads(row)
            for answer in fields.get("responses") or [fields.get("completion", fields["prompt"])]:
                digest = _digest(seed, json.dumps(answer, ensure_ascii=False).casefold())
                row_of.append(number)
                answer_of.append(numbers.setdefault(digest, len(numbers)))
    count = row_of[-1] + 1
    joined = (np.ones(len(row_of)), (np.asarray(row_of), np.asarray(answer_of) + count))
    graph = sparse.coo_array(joined, shape=(count + len(numbers),) * 2)
    _, labels = connected_components(graph, directed=False)
    smallest: dict[int, int] = {}
    for answer, label in zip(numbers, labels[count:].tolist(), strict=True):
        smallest[label] = min(answer, smallest.get(label, answer))
    return array("Q", (smallest[label] for label in labels[:count].tolist()))


def _digest(*parts: Any) -> int:
    text = json.dumps(parts, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
