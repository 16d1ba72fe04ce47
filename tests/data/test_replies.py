"""The records of `rlhf demo`."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rlhf.data import replies
from rlhf.data.records import read_rows


def worth(prompt: str, text: str) -> int:
    """What customers think of a reply on average, read off its words."""
    sentences = [
        (tone, sentence.split("{}"))
        for table in (replies.OPENINGS, replies.ENDINGS)
        for tone, group in table.items()
        for sentence in group
    ]
    tones = [tone for tone, parts in sentences if all(part in text for part in parts)]
    assert len(tones) == 2
    return sum(tones) - (prompt_thing(prompt) not in text)


def prompt_thing(prompt: str) -> str:
    (thing,) = (thing for thing in replies.THINGS if f" {thing} " in prompt)
    return thing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    replies.write_records(folder)
    return folder


def test_customers_rank_by_worth_and_disagree_as_people_do(folder: Path):
    """Most neighbours of a ranking are in the order of their worth, and no two customers rank all sets alike."""
    rows = read_rows(folder / "comparisons.jsonl")
    steps = [
        worth(row["prompt"], row["responses"][better]) - worth(row["prompt"], row["responses"][worse])
        for row in rows
        for ranking in row["rankings"]
        for better, worse in pairwise(ranking)
    ]
    assert 0.03 < np.mean(np.array(steps) < 0) < 0.2
    assert any(first != second for first, second, _ in (row["rankings"] for row in rows))


def test_old_replies_leave_something_to_learn(folder: Path):
    """Few are kind and about the thing, but each prompt's kind reply can be found by sampling."""
    rows = read_rows(folder / "demonstrations.jsonl")
    best = np.mean([worth(row["prompt"], row["completion"]) == 2 for row in rows])
    assert 0.05 < best < 0.2


def test_the_same_records_are_written_every_time(folder: Path, tmp_path: Path):
    """Their digests are in the keys, so a second call finds the first one's results."""
    replies.write_records(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    prompts = [row["prompt"] for row in read_rows(folder / "prompts.jsonl")]
    assert len(set(prompts)) == len(prompts) == 8 * 6 * 8
