"""Two policies side by side: their responses to the same prompts, and what reward model and judge say of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.jsonl import read_rows
from rlhf.models.judge import Judge
from rlhf.textstats import distinct_ngrams, paired_interval


def judge_of(folder: Path) -> Judge:
    """The judge fitted on a data set's ratings."""
    rows = read_rows(folder / "ratings.jsonl")
    return Judge.fit([row["text"] for row in rows], [row["rating"] for row in rows])


def judged(judge: Judge, before: list[str], after: list[str]) -> dict[str, float]:
    """Mean ratings, and their difference with its paired 95 % interval."""
    ratings_before, ratings_after = judge.rate(before), judge.rate(after)
    interval = paired_interval(ratings_before, ratings_after)
    return {
        "judge/before": float(np.mean(ratings_before)),
        "judge/after": float(np.mean(ratings_after)),
        "judge/delta": interval.mean,
        "judge/delta_low": interval.low,
        "judge/delta_high": interval.high,
    }


def diversity(before: list[str], after: list[str]) -> dict[str, float]:
    """Distinct bigrams of equally many texts."""
    return {"distinct_2/before": distinct_ngrams(before, 2), "distinct_2/after": distinct_ngrams(after, 2)}


def write_samples(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the prompts with both responses and their scores, for the user to read."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
