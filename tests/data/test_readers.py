import bz2
import gzip
import json
import lzma
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import readers
from rlhf.data.readers import Row, read_source
from rlhf.errors import RecordError, SettingsError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"p{index}", "n": [index, None, 0.5], "text": 'a "],[{\né'} for index in range(7)
]


def rows_of(path: Path) -> list[Row]:
    return list(read_source(str(path)))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    """How rows are stored must not change what they hold."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "c.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "e.feather")
    with pyarrow.ipc.new_stream(tmp_path / "f.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    for source in ("a.jsonl", "b.json"):
        content = (tmp_path / source).read_bytes()
        for suffix, compressed in compressions(content).items():
            (tmp_path / f"{source}{suffix}").write_bytes(compressed)
            (tmp_path / f"{source}{suffix}".upper()).write_bytes(compressed)
    (tmp_path / "g.NDJSON").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for path in sorted(tmp_path.iterdir()):
        assert [row.value for row in rows_of(path)] == ROWS, path.name


def compressions(content: bytes) -> dict[str, bytes]:
    zstd = pyarrow.compress(content, codec="zstd", asbytes=True)
    return {
        ".gz": gzip.compress(content, mtime=0),
        ".bz2": bz2.compress(content),
        ".xz": lzma.compress(content),
        ".zst": zstd,
    }


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_breaks_off_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    """The rows before the break must not pass for the whole file."""
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compressions(b'{"n": 1}\n' * 1000)[suffix][:-6])
    with pytest.raises(RecordError, match="the file is damaged") as caught:
        rows_of(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("name", "content", "what", "next_step"),
    [
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "Git LFS pointer",
            "lfs pull",
        ),
        (
            "a.json",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "Git LFS pointer",
            "lfs pull",
        ),
        ("a.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "lfs pull"),
        ("a.arrow", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", "lfs pull"),
        ("a.jsonl", '{"n": 1}\n'.encode("utf-16"), "the file is UTF-16", "iconv -f UTF-16 -t UTF-8"),
        ("a.json", '[{"n": 1}]'.encode("utf-16-be"), "the file is UTF-16-BE", "iconv -f UTF-16-BE -t UTF-8"),
        ("a.ndjson", '{"n": 1}'.encode("utf-32"), "the file is UTF-32", "iconv -f UTF-32 -t UTF-8"),
        ("a.jsonl", gzip.compress(b'{"n": 1}\n', mtime=0), "the file is gzip-compressed", "end in .gz"),
        ("a.json", b"PAR1....PAR1", "the file is Parquet", "end in .parquet"),
    ],
)
def test_a_file_that_is_something_else_than_its_name_says_is_called_that(
    tmp_path: Path, name: str, content: bytes, what: str, next_step: str
) -> None:
    """Its lines as bad rows would hide what is wrong with all of them."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=what) as caught:
        rows_of(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert next_step in caught.value.next_step


def test_nan_in_a_table_is_null_at_any_depth(tmp_path: Path) -> None:
    """Pandas and numpy write NaN where there is no number; JSON has null for that, and its NaN stays a mistake."""
    nan = float("nan")
    table = pyarrow.table({"margin": [nan, 1.0], "ratings": [[[1.0, nan]], [[nan, 2.0]]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"margin": NaN}\n')
    assert [row.value for row in rows_of(tmp_path / "a.parquet")] == [
        {"margin": None, "ratings": [[1.0, None]]},
        {"margin": 1.0, "ratings": [[None, 2.0]]},
    ]
    (row,) = rows_of(tmp_path / "a.jsonl")
    assert math.isnan(row.value["margin"])


def test_a_folder_is_read_file_by_file_in_the_order_of_paths(tmp_path: Path) -> None:
    """The order of rows must not depend on how a file system lists a folder."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 0}\n{"n": 1}\n')
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
        ('[{"n": 1},\n {"n": 2, "n": 3}]', 1, 2, "the field 'n' occurs twice"),
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
        (b'{"n": 1, "m": {"k": 2, "k": 3}}', "the field 'k' occurs twice"),
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


def test_a_damaged_table_is_refused_by_name(tmp_path: Path) -> None:
    """A file that is no table has no rows to name: the error names the file."""
    for name in ("a.parquet", "a.arrow", "a.feather"):
        for content in (b"PAR1 nothing", b"ARROW1 nothing", b"nothing at all"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(RecordError, match="damaged") as caught:
                rows_of(tmp_path / name)
            assert caught.value.where == str(tmp_path / name)


def test_a_source_that_is_not_there_says_what_would_be(tmp_path: Path) -> None:
    """A missing path, an empty folder and an unpinned hub name are each refused."""
    (tmp_path / "empty").mkdir()
    for source, reason in [
        (str(tmp_path / "no.jsonl"), "there is no file or folder"),
        (str(tmp_path / "empty"), "there is none"),
        ("someone/dataset", "40 hexadecimal digits"),
        ("someone/dataset@main", "Files and versions"),
    ]:
        with pytest.raises(SettingsError, match=reason):
            list(read_source(source))


def test_a_column_that_stands_twice_is_refused_by_name(tmp_path: Path) -> None:
    """As a field of JSON is; the last would win otherwise."""
    column = pyarrow.array(["p"])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays([column, column], ["prompt", "prompt"]), tmp_path / "a.parquet"
    )
    with pytest.raises(RecordError, match="the column 'prompt' occurs twice"):
        rows_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_of_no_bytes_is_damaged(tmp_path: Path, suffix: str) -> None:
    """A download that did not begin leaves it; a file of no rows has some bytes when it is compressed."""
    (tmp_path / f"a.jsonl{suffix}").touch()
    with pytest.raises(RecordError, match="the file is damaged"):
        rows_of(tmp_path / f"a.jsonl{suffix}")
