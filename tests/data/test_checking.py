import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.records import ComparisonSet, Prompt
from rlhf.data.validation import RecordReader
from rlhf.errors import RecordError

SET: dict[str, Any] = {"prompt": "p", "responses": ["a", "b", "c"]}


def test_comparison_sets_come_out_of_parquet_as_out_of_jsonl(tmp_path: Path) -> None:
    """Parquet stores indices beside halves as floats and absent columns as null: the same records all the same."""
    values: list[dict[str, Any]] = [
        SET | {"winners": [[0, 1, 0.5], [2, 1, 1]], "ratings": None},
        SET | {"ratings": [[1, None], [2, 3], [3, 3]], "winners": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    jsonl, parquet = (
        list(RecordReader(str(tmp_path / name), ComparisonSet, tmp_path / "quarantine.jsonl"))
        for name in ("a.jsonl", "a.parquet")
    )
    assert jsonl == parquet
    assert len(jsonl) == 2


def write_prompts(path: Path, good: int, bad: int) -> Path:
    lines = ['{"prompt": "p"}'] * good + ['{"prompt": ""}'] * bad
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_error_names_three_bad_rows_counts_the_rest_and_gives_the_quarantine_file(tmp_path: Path) -> None:
    """Enough to act on, in a few lines, however many rows are bad."""
    path = write_prompts(tmp_path / "a.jsonl", good=10, bad=5)
    quarantine = tmp_path / "quarantine.jsonl"
    with pytest.raises(RecordError) as caught:
        list(RecordReader(str(path), Prompt, quarantine))
    assert caught.value.what == "5 of 15 rows are malformed"
    assert caught.value.where.splitlines() == [
        f"{path}:11: prompt: is empty",
        f"  {path}:12: prompt: is empty",
        f"  {path}:13: prompt: is empty",
        "  and 2 more",
    ]
    assert str(quarantine) in caught.value.next_step
    assert len(quarantine.read_text().splitlines()) == 5


def test_the_quarantine_file_holds_place_reasons_and_content_of_each_bad_row(tmp_path: Path) -> None:
    """What is refused can be repaired from the quarantine file alone, even where it is no UTF-8 or no JSON."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "p"}\n{"prompt": "", "x": "\\ud800"}\n{"prompt": "caf\xe9"}\n{"prompt"\n')
    quarantine = tmp_path / "quarantine.jsonl"
    reader = RecordReader(str(path), Prompt, quarantine, max_bad_fraction=0.75)
    assert list(reader) == [Prompt(prompt="p")]
    assert (reader.good, reader.bad) == (1, 3)
    empty, not_utf8, not_json = map(json.loads, quarantine.read_text().splitlines())
    assert empty == {
        "file": str(path),
        "line": 2,
        "reasons": [
            {"field": "prompt", "problem": "is empty"},
            {"field": "x", "problem": "is unknown; known: group, prompt"},
        ],
        "content": {"prompt": "", "x": "\ud800"},
    }
    assert (not_utf8["line"], not_utf8["content"]) == (3, '{"prompt": "caf\\xe9"}')
    assert (not_json["line"], not_json["content"]) == (4, '{"prompt"')


@pytest.mark.parametrize(
    ("good", "bad", "allowed", "stops"), [(9, 1, 0.1, False), (9, 1, 0.09, True), (0, 2, 0.9, True)]
)
def test_bad_rows_stop_the_reading_only_above_the_fraction(
    tmp_path: Path, good: int, bad: int, allowed: float, stops: bool
) -> None:
    """Exactly the allowed fraction passes; nothing but bad rows never does."""
    path = write_prompts(tmp_path / "a.jsonl", good, bad)
    reader = RecordReader(str(path), Prompt, tmp_path / "quarantine.jsonl", allowed)
    if stops:
        with pytest.raises(RecordError):
            list(reader)
    else:
        assert len(list(reader)) == good


def test_good_rows_leave_no_quarantine_file_and_no_rows_are_an_error(tmp_path: Path) -> None:
    """A quarantine file means that there is something to repair; an empty source is a mistake."""
    quarantine = tmp_path / "quarantine.jsonl"
    list(RecordReader(str(write_prompts(tmp_path / "a.jsonl", 2, 0)), Prompt, quarantine))
    assert not quarantine.exists()
    with pytest.raises(RecordError, match="there are no rows"):
        list(RecordReader(str(write_prompts(tmp_path / "b.jsonl", 0, 0)), Prompt, quarantine))


def test_records_are_streamed(tmp_path: Path) -> None:
    """The first record is there before the last row is read, so memory does not grow with the file."""
    path = write_prompts(tmp_path / "a.jsonl", good=3, bad=1)
    reader = RecordReader(str(path), Prompt, tmp_path / "quarantine.jsonl")
    next(iter(reader))
    assert (reader.good, reader.bad) == (1, 0)
