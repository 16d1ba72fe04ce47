"""Read rows from JSONL, JSON, Parquet and Arrow files, folders of these, and datasets on the Hugging Face hub.

Files are streamed: besides the current rows, a reader holds one line, one element of an array or one batch of a table.
An unreadable row is yielded with its problem instead of raising an exception, so that one bad line hides no other.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.config.base import ARROW_SUFFIXES, COMPRESSED_SUFFIXES, HubDataset, is_local, parse_hub_dataset
from rlhf.data.record_files import record_files
from rlhf.errors import IndexUnreachableError, RecordError, SettingsError, refused_cache

CHUNK_CHARACTERS = 1 << 20
BATCH_ROWS = 1024
NAMED_BAD_ROWS = 20
"""Number of bad rows that an error names where no quarantine file lists them all."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

_FOREIGN = {
    b"\x1f\x8b": ("gzip-compressed", ".gz"),
    b"BZh": ("bzip2-compressed", ".bz2"),
    b"\xfd7zXZ\x00": ("xz-compressed", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd-compressed", ".zst"),
    b"PK\x03\x04": ("a zip archive", ".zip"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
}
"""First bytes of files that are not JSON: the kind of file, and its suffix."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, and its place."""

    file: str
    """The file's path, or the hub dataset's name."""
    number: int
    """Line of a text file on which the row begins, or row of a Parquet file or dataset; counted from 1."""
    value: Any
    """The row's content; its text where ``problem`` says why it could not be read."""
    problem: str = ""
    counts_lines: bool = True
    """Whether ``number`` is a line or a row."""

    @property
    def place(self) -> str:
        """The row's place as messages show it: ``file:line`` or ``file, row n``."""
        return f"{self.file}:{self.number}" if self.counts_lines else f"{self.file}, row {self.number}"


def malformed(
    bad: Sequence[str], total: int, as_what: str, next_step: str, *, count: int = 0, rows: str = "rows"
) -> RecordError:
    """Return the error that counts the bad rows, and names the first of them by their places and reasons.

    count  the number of bad rows where ``bad`` holds only the first of them
    """
    named = bad[:NAMED_BAD_ROWS]
    count = count or len(bad)
    more = f"\n  and {count - len(named)} more" if count > len(named) else ""
    return RecordError(f"{count} of {total} {rows} are malformed{as_what}", "\n  ".join(named) + more, next_step)


def read_source(source: str, *, mixes_splits: bool = False) -> Iterator[Row]:
    """Return the rows of a source in order; a folder's files are read in the order of their paths.

    mixes_splits  whether a folder may hold training and held-out data side by side

    Raises:
        SettingsError: the source is neither there nor a pinned hub name.
        RequestError: a file is of a kind that is not read here, or a folder mixes splits and may not.
        RecordError: a file is damaged as a whole, or is something else than its name says.
        IndexUnreachableError: the hub does not answer.

    """
    if not is_local(source):
        try:
            dataset = parse_hub_dataset(source)
        except ValueError as problem:
            raise SettingsError(str(problem), source) from None
        return _hub_rows(dataset)
    files = record_files(Path(source).expanduser(), mixes_splits=mixes_splits)
    return (row for file in files for row in _file_rows(file))


def _file_rows(path: Path) -> Iterator[Row]:
    name = path.name.casefold()
    is_table = name.endswith((".parquet", *ARROW_SUFFIXES))
    try:
        _check_content(path, is_text=not is_table)
        if is_table:
            yield from _table_rows(path)
        else:
            yield from _line_rows(path) if ".jsonl" in name or ".ndjson" in name else _array_rows(path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # A truncated compressed stream is an OSError without a number.
        if error.errno is None:
            raise _damaged(path, error) from error
        raise SettingsError(f"the file cannot be read: {error.strerror}", str(path), "allow it to be read") from error


def _damaged(path: Path, error: Exception | str) -> RecordError:
    return RecordError(f"the file is damaged: {error}", str(path), "write or download the file again")


def _open(path: Path) -> BinaryIO:
    """Open a text file's bytes, decompressed according to its suffix."""
    suffix = path.suffix.casefold()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))  # type: ignore[return-value]  # a file of bytes in all but its class
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[suffix](path) if suffix in openers else path.open("rb")


def _check_content(path: Path, *, is_text: bool) -> None:
    """Refuse a Git LFS pointer, and text that is compressed, UTF-16 or UTF-32, or compressed and empty."""
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise RecordError(
            "the file is a Git LFS pointer, and its data was not downloaded",
            str(path),
            f"git -C {shlex.quote(str(path.parent))} lfs pull",
        )
    if not is_text:
        return
    if not start and path.suffix.casefold() in COMPRESSED_SUFFIXES:
        # Even the compressed form of no bytes has some bytes.
        raise _damaged(path, "it is empty")
    with _open(path) as file:
        start = file.read(len(_LFS_POINTER))
    for beginning, (kind, suffix) in _FOREIGN.items():
        if start.startswith(beginning):
            raise RecordError(f"the file is {kind}, and its name says JSON", str(path), f"let its name end in {suffix}")
    encoding = json.detect_encoding(start).upper()
    if not encoding.startswith("UTF-8"):
        raise RecordError(
            f"the file is {encoding}, and JSON is read as UTF-8",
            str(path),
            f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}",
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated fields: JSON allows them, and Python's reader would keep the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} occurs twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _line_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            try:
                text = line.decode(encoding)
                if text.strip():
                    yield Row(str(path), number, json.loads(text, object_pairs_hook=_object))
                continue
            except UnicodeDecodeError as error:
                problem = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line is not UTF-8"
            except json.JSONDecodeError as error:
                problem = f"invalid JSON at character {error.pos + 1}: {error.msg}"
            except (ValueError, RecursionError) as error:
                # Repeated fields, numbers of thousands of digits and nesting of thousands of levels.
                problem = f"unreadable JSON: {error}"
            yield Row(str(path), number, line.decode(encoding, "backslashreplace").rstrip("\r\n"), problem)


class _Window:
    """A sliding window over a text file that counts the lines it has passed."""

    def __init__(self, path: Path) -> None:
        # Bytes that are not UTF-8 become lone surrogates, which the check of their field refuses.
        self.file = io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape")
        self.text = ""
        self.at = 0
        self.line = 1
        self.ended = False

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def read_more(self) -> None:
        kept = self.text[self.at :]
        # Doubling the window keeps the work for one long element linear in its length.
        more = self.file.read(max(CHUNK_CHARACTERS, len(kept)))
        self.ended = not more
        self.text, self.at = kept + more, 0

    def next_character(self) -> str:
        """Return the next character that is no white space, without passing it; empty at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end].isspace():
                end += 1
            self.advance(end)
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self.read_more()

    def next_element(self) -> Any:
        """Return the JSON value that begins here; raise ValueError where none does, whatever follows."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except ValueError:
                if self.ended:
                    raise
            else:
                # A value that reaches the window's end may continue after it.
                if end < len(self.text) or self.ended:
                    self.advance(end)
                    return value
            self.read_more()


def _array_rows(path: Path) -> Iterator[Row]:
    """Yield the elements of a JSON array, or the lines of a file that does not begin with a bracket."""
    window = _Window(path)
    with window.file:
        if window.next_character() != "[":
            yield from _line_rows(path)
            return
        window.advance(window.at + 1)
        separator = "["
        while (character := window.next_character()) != "]" or separator == ",":
            line = window.line
            try:
                value = window.next_element()
            except (ValueError, RecursionError) as error:
                # The beginning of the next element is unknown, so the rest of the file is not read.
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                rest = window.text[window.at : window.at + 200]
                yield Row(str(path), line, rest, f"invalid JSON: {reason}; the rest of the file is not read")
                return
            yield Row(str(path), line, value)
            separator = window.next_character()
            if separator not in (",", "]"):
                other = repr(separator) if separator else "the end of the file"
                yield Row(str(path), window.line, "", f"invalid JSON: expected ',' or ']', found {other}")
                return
            if separator == ",":
                window.advance(window.at + 1)
        window.advance(window.at + 1)
        if character := window.next_character():
            yield Row(str(path), window.line, "", f"invalid JSON: {character!r} after the end of the array")


def _table_rows(path: Path) -> Iterator[Row]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            names = batch.schema.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                problem = f"the column {twice!r} occurs twice"
                raise RecordError(problem, str(path), "write the file again with one of them")
            for value, problem in _batch_values(batch):
                number += 1
                yield Row(str(path), number, value, problem, counts_lines=False)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _damaged(path, error) from error


def _batches(path: Path) -> Iterator[Any]:
    """Yield the batches of Parquet, of the Arrow stream that ``save_to_disk`` writes, of an Arrow or Feather file."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    if path.suffix.casefold() == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(BATCH_ROWS)
        return
    with pyarrow.memory_map(str(path)) as source:
        if source.read(len(b"ARROW1")) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        for batch in batches:
            yield from (batch.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))


def _batch_values(batch: Any) -> Iterator[tuple[Any, str]]:
    """Yield each row's value and problem."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError as error:
        # Parquet promises UTF-8 and does not check it: find the rows that break the promise.
        if batch.num_rows == 1:
            yield None, f"byte 0x{error.object[error.start]:02x} in a text is not UTF-8"
            return
        for index in range(batch.num_rows):
            yield from _batch_values(batch.slice(index, 1))
        return
    yield from ((_nan_as_null(value), "") for value in values)


def _nan_as_null(value: Any) -> Any:
    """Replace NaN by None: pandas and numpy write it for a missing number."""
    if isinstance(value, dict):
        return {key: _nan_as_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_as_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _hub_rows(dataset: HubDataset) -> Iterator[Row]:
    import datasets
    import datasets.exceptions

    where = f"{dataset.name}@{dataset.revision}#{dataset.split}"
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            dataset.name, revision=dataset.revision, split=dataset.split, streaming=True
        )
        for number, value in enumerate(rows, 1):
            yield Row(dataset.name, number, _nan_as_null(dict(value)), counts_lines=False)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise SettingsError(f"the hub does not show the dataset: {error}", where, "check name and access") from error
    except ValueError as error:
        raise SettingsError(f"the dataset cannot be read: {error}", where, "check name, revision and split") from error
    except OSError as error:
        raise refused_cache(error) or IndexUnreachableError(
            f"the hub did not answer: {error}",
            where,
            "try again, or download the dataset where there is a network and name the folder",
        ) from error
