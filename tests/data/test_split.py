import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.jsonl import read_jsonl, write_jsonl
from rlhf.data.records import Demonstration
from rlhf.data.split import SplitCounts, write_split


def demonstration(prompt: Any, completion: str = "c") -> Demonstration:
    return Demonstration.model_validate({"prompt": prompt, "completion": completion})


def prompts_of(path: Path) -> list[str]:
    return [json.dumps(record.model_dump()["prompt"]) for record in read_jsonl(path, Demonstration)]


@given(
    prompts=st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=40),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 5),
)
def test_no_prompt_is_in_both_parts_and_no_row_is_lost(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], fraction: float, seed: int
) -> None:
    """A held-out prompt is one that training never saw, however often prompts repeat."""
    folder = tmp_path_factory.mktemp("split")
    counts = write_split(folder, map(demonstration, prompts), fraction, seed)
    train, heldout = prompts_of(folder / "train.jsonl"), prompts_of(folder / "heldout.jsonl")
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(map(json.dumps, prompts))
    assert counts == SplitCounts(len(train), len(heldout))
    assert train, "something is left to train on"
    distinct = len(set(prompts))
    expected = 0 if fraction == 0 or distinct == 1 else min(max(1, round(fraction * distinct)), distinct - 1)
    assert len(set(heldout)) == expected
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "heldout.jsonl"}


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    """Sorting a file must not move prompts between the parts; another seed must."""
    rows = [demonstration([{"role": "user", "content": f"p{index}"}]) for index in range(100)]
    for name, ordered, seed in [("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)]:
        write_split(tmp_path / name, ordered, 0.2, seed)
    first, reordered, reseeded = (set(prompts_of(tmp_path / name / "heldout.jsonl")) for name in "abc")
    assert first == reordered != reseeded


def test_records_survive_being_written_and_read(tmp_path: Path) -> None:
    """Line separators inside a text, which some readers split at, must not split a row."""
    records = [demonstration("a\u2028b\x85c", "d\r\ne"), demonstration("é", "\x00\u0001")]
    assert write_jsonl(tmp_path / "new" / "a.jsonl", records) == 2
    assert list(read_jsonl(tmp_path / "new" / "a.jsonl", Demonstration)) == records
