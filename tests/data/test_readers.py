import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import readers
from rlhf.data.readers import Row, read_rows
from rlhf.errors import RecordError, SettingsError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{index}", "n": [index, None, 0.5], "text": 'a "],[{\né'} for index in range(7)
]


def rows_of(path: Path) -> list[Row]:
    return list(read_rows(str(path)))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    """How rows are stored must not change what they hold."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.parquet"):
        assert [row.value for row in rows_of(tmp_path / name)] == ROWS, name


def test_a_folder_is_read_file_by_file_in_the_order_of_paths(tmp_path: Path) -> None:
    """The order of rows must not depend on how a file system lists a folder; other files are passed over."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n{"n": 1}\n')
    (tmp_path / "README.md").write_text("not data")
    assert [(row.value["n"], row.number) for row in rows_of(tmp_path)] == [(0, 1), (1, 2), (2, 1)]


def test_lines_are_counted_with_blank_ones_and_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    """A named line must be the line that an editor shows."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n   \n{"n": 2}')
    assert [(row.number, row.value) for row in rows_of(path)] == [(1, {"n": 1}), (4, {"n": 2})]


@given(
    values=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=30) | st.integers() | st.none()) | st.integers(),
        max_size=6,
    ),
    indent=st.sampled_from([None, 2]),
    chunk=st.integers(1, 40),
)
def test_an_array_is_read_the_same_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, chunk: int
) -> None:
    """Reading piece by piece must equal parsing the whole file at once, and name each element's own line."""
    path = tmp_path_factory.mktemp("array") / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=True)
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_CHARACTERS", chunk)
        rows = rows_of(path)
    assert [row.value for row in rows] == values
    assert not any(row.problem for row in rows)
    for row in rows:
        begins = "{" if isinstance(row.value, dict) else str(row.value)
        assert begins in text.splitlines()[row.number - 1]


@pytest.mark.parametrize(
    ("text", "good", "line", "reason"),
    [
        ('[{"n": 1},\n {"n": }]', 1, 2, "invalid JSON"),
        ('[{"n": 1}\n {"n": 2}]', 1, 2, "expected ',' or ']'"),
        ('[{"n": 1},\n', 1, 2, "invalid JSON"),
        ('[{"n": 1}', 1, 1, "the end of the file"),
        ("[", 0, 1, "invalid JSON"),
        ('[{"n": 1},\n]', 1, 2, "invalid JSON"),
        ('[{"n": 1}]\n{"n": 2}', 1, 2, "after the end of the array"),
        ('[{"n": 1},\n {"n": 2, "n": 3}]', 1, 2, "the field 'n' stands twice"),
    ],
)
def test_a_broken_array_gives_the_rows_before_the_break_and_names_its_line(
    tmp_path: Path, text: str, good: int, line: int, reason: str
) -> None:
    """What precedes the damage stays readable, and the damage is never silent."""
    (tmp_path / "a.json").write_text(text)
    *before, broken = rows_of(tmp_path / "a.json")
    assert [row.problem for row in before] == [""] * good
    assert broken.number == line
    assert reason in broken.problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"n": "caf\xe9"}', "byte 0xe9 at position 11 of the line is not UTF-8"),
        (b'{"n": 1,}', "invalid JSON at character 9"),
        (b"[" * 100_000, "unreadable JSON"),
        (b'{"n": 1, "m": {"k": 2, "k": 3}}', "the field 'k' stands twice"),
        (b'{"n": ' + b"9" * 5000 + b"}", "unreadable JSON"),
    ],
)
def test_an_unreadable_line_is_one_bad_row_and_hides_no_other(tmp_path: Path, line: bytes, reason: str) -> None:
    """Rows after a bad line are still read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    first, bad, last = rows_of(path)
    assert (first.value, last.value, last.number) == ({"n": 1}, {"n": 3}, 3)
    assert reason in bad.problem
    assert bad.place == f"{path}:2"


def test_a_parquet_row_that_is_not_utf8_is_named_by_its_number(tmp_path: Path) -> None:
    """Parquet does not check its own promise of UTF-8; the row that breaks it is found among its batch."""
    texts = pyarrow.array([b"good", b"caf\xe9", b"fine"], pyarrow.binary())
    table = pyarrow.table({"prompt": pyarrow.Array.from_buffers(pyarrow.string(), 3, texts.buffers())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    good, bad, fine = rows_of(tmp_path / "a.parquet")
    assert (good.value, fine.value) == ({"prompt": "good"}, {"prompt": "fine"})
    assert bad.place == f"{tmp_path / 'a.parquet'}, row 2"
    assert "byte 0xe9" in bad.problem


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    """A file that is no Parquet file has no rows to name: the error names the file."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(RecordError) as caught:
        rows_of(tmp_path / "a.parquet")
    assert caught.value.where == str(tmp_path / "a.parquet")


def test_a_source_that_is_not_there_says_what_would_be(tmp_path: Path) -> None:
    """A missing path, an empty folder, an unknown kind of file and an unpinned hub name are each refused."""
    (tmp_path / "a.csv").write_text("n\n1\n")
    for source, reason in [
        (str(tmp_path / "no.jsonl"), "there is no file or folder"),
        (str(tmp_path), "there is none"),
        (str(tmp_path / "a.csv"), "there is none"),
        ("someone/dataset", "40 hexadecimal digits"),
        ("someone/dataset@main", "Files and versions"),
    ]:
        with pytest.raises(SettingsError, match=reason):
            list(read_rows(source))
