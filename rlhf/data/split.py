"""Holding records out by prompt."""

import hashlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from rlhf.data.jsonl import to_line
from rlhf.data.records import ComparisonSet, Demonstration, Prompt


class SplitCounts(NamedTuple):
    """Rows of each part."""

    train: int
    heldout: int


def write_split(
    folder: Path, records: Iterable[Demonstration | ComparisonSet | Prompt], fraction: float, seed: int
) -> SplitCounts:
    """Write ``train.jsonl`` and ``heldout.jsonl``, the latter with a seeded ``fraction`` of the distinct prompts.

    The prompts held out are those with the smallest digests of seed and prompt, so neither the order of the rows nor
    how often a prompt occurs decides. Of two or more prompts at least one goes to either part, unless ``fraction`` is
    0; a single prompt cannot be in both and is not held out. Beside the files, memory holds 8 bytes a row and one
    number a distinct prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = folder / "everything.jsonl"
    digests = array("Q")
    with everything.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            digests.append(_prompt_digest(record, seed))
            file.write(to_line(record))
    distinct = sorted(set(digests))
    share = min(max(1, round(fraction * len(distinct))), len(distinct) - 1) if fraction else 0
    heldout = set(distinct[:share])
    with (
        everything.open(encoding="utf-8", newline="\n") as rows,
        (folder / "train.jsonl").open("w", encoding="utf-8", newline="\n") as train_file,
        (folder / "heldout.jsonl").open("w", encoding="utf-8", newline="\n") as heldout_file,
    ):
        for digest, row in zip(digests, rows, strict=True):
            (heldout_file if digest in heldout else train_file).write(row)
    everything.unlink()
    count = sum(digest in heldout for digest in digests)
    return SplitCounts(len(digests) - count, count)


def _prompt_digest(record: Demonstration | ComparisonSet | Prompt, seed: int) -> int:
    prompt = record.model_dump(include={"prompt"})["prompt"]
    text = json.dumps([seed, prompt], ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
