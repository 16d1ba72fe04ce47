"""Rows out of JSONL, JSON and Parquet files, folders of those, and datasets on the Hugging Face hub.

Files are streamed: beside the rows in hand, a reader holds one line, one element of an array or one batch of a Parquet
file. What cannot be read is a row with a problem rather than an exception, so that one bad line hides no other.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.sources import FILE_SUFFIXES, HubDataset, is_local, parse_hub_dataset
from rlhf.errors import IndexUnreachableError, RecordError, SettingsError, refused_cache

CHUNK_CHARACTERS = 1 << 20
PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read, and where it stands."""

    file: str
    """The file's path, or the hub dataset's name."""
    number: int
    """Line of a text file on which the row begins, or row of a Parquet file or dataset; counted from 1."""
    value: Any
    """What the row holds; where ``problem`` says why it could not be read, its text."""
    problem: str = ""
    counts_lines: bool = True
    """Whether ``number`` is a line or a row."""

    @property
    def place(self) -> str:
        """The row's place for a reader: ``file:line`` or ``file, row n``."""
        return f"{self.file}:{self.number}" if self.counts_lines else f"{self.file}, row {self.number}"


def read_rows(source: str) -> Iterator[Row]:
    """Read the rows of a source in order; a folder's files are read in the order of their paths.

    Raises:
        SettingsError: the source is neither there nor a pinned hub name, or it is no kind of file that is read here.
        RecordError: a Parquet file is damaged as a whole.
        IndexUnreachableError: the hub does not answer.

    """
    if not is_local(source):
        try:
            dataset = parse_hub_dataset(source)
        except ValueError as problem:
            raise SettingsError(str(problem), source) from None
        return _hub_rows(dataset)
    return (row for file in _files(Path(source).expanduser()) for row in _file_rows(file))


def _files(path: Path) -> list[Path]:
    if not os.path.exists(path):  # noqa: PTH110 - of a name that is too long it says that there is none
        raise SettingsError(f"there is no file or folder {path}", str(path), "correct the path")
    if path.is_file():
        files = [path] if path.suffix in FILE_SUFFIXES else []
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix in FILE_SUFFIXES and file.is_file())
    if not files:
        raise SettingsError(
            f"records are read from {', '.join(FILE_SUFFIXES)} files, and there is none",
            str(path),
            "name such a file, or a folder that holds some",
        )
    return files


def _file_rows(path: Path) -> Iterator[Row]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
        elif path.suffix == ".json" and _begins_with_bracket(path):
            yield from _array_rows(path)
        else:
            yield from _line_rows(path)
    except OSError as error:
        raise SettingsError(f"the file cannot be read: {error.strerror}", str(path), "allow it to be read") from error


def _begins_with_bracket(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        while character := file.read(1):
            if not character.isspace():
                return character == "["
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a field stand twice, and Python's reader would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} stands twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _line_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line is not UTF-8"
                yield Row(str(path), number, line.decode("utf-8", "backslashreplace").rstrip("\r\n"), problem)
                continue
            if not text.strip():
                continue
            try:
                yield Row(str(path), number, json.loads(text, object_pairs_hook=_object))
            except json.JSONDecodeError as error:
                problem = f"invalid JSON at character {error.pos + 1}: {error.msg}"
                yield Row(str(path), number, text.rstrip("\r\n"), problem)
            except (ValueError, RecursionError) as error:
                # Fields that stand twice, numbers of thousands of digits and nesting of thousands of levels.
                yield Row(str(path), number, text.rstrip("\r\n"), f"unreadable JSON: {error}")


class _Window:
    """A sliding window over a text file, which knows the line it has come to."""

    def __init__(self, path: Path) -> None:
        # Bytes that are not UTF-8 become lone surrogates, which the check of the field they stand in refuses.
        self.file = path.open(encoding="utf-8-sig", errors="surrogateescape")
        self.text = ""
        self.at = 0
        self.line = 1
        self.ended = False

    def advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def read_more(self) -> None:
        kept = self.text[self.at :]
        # Doubling keeps the re-reading of one long element linear in its length.
        more = self.file.read(max(CHUNK_CHARACTERS, len(kept)))
        self.ended = not more
        self.text, self.at = kept + more, 0

    def next_character(self) -> str:
        """Look at the next character that is no white space, without passing it; empty at the end of the file."""
        while True:
            rest = len(self.text)
            end = self.at
            while end < rest and self.text[end].isspace():
                end += 1
            self.advance(end)
            if end < rest or self.ended:
                return self.text[end : end + 1]
            self.read_more()

    def next_element(self) -> Any:
        """Parse one JSON value.

        Raises:
            ValueError: what stands here is no JSON value, whatever follows it.

        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except ValueError:
                if self.ended:
                    raise
            else:
                # A value that touches the window's end may go on behind it.
                if end < len(self.text) or self.ended:
                    self.advance(end)
                    return value
            self.read_more()


def _array_rows(path: Path) -> Iterator[Row]:
    window = _Window(path)
    with window.file:
        window.next_character()
        window.advance(window.at + 1)
        separator = "["
        while (character := window.next_character()) != "]" or separator == ",":
            line = window.line
            try:
                value = window.next_element()
            except (ValueError, RecursionError) as error:
                # Nothing says where the next element would begin, so the rest of the file is unread.
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                rest = window.text[window.at : window.at + 200]
                yield Row(str(path), line, rest, f"invalid JSON: {reason}; what follows is not read")
                return
            yield Row(str(path), line, value)
            separator = window.next_character()
            if separator not in (",", "]") or not separator:
                found = repr(separator) if separator else "the end of the file"
                yield Row(str(path), window.line, "", f"invalid JSON: expected ',' or ']', found {found}")
                return
            if separator == ",":
                window.advance(window.at + 1)
        window.advance(window.at + 1)
        if character := window.next_character():
            yield Row(str(path), window.line, "", f"invalid JSON: {character!r} after the end of the array")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                for value, problem in _batch_values(batch):
                    number += 1
                    yield Row(str(path), number, value, problem, counts_lines=False)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RecordError(f"the Parquet file cannot be read: {error}", str(path), "write the file again") from error


def _batch_values(batch: Any) -> Iterator[tuple[Any, str]]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        # Parquet promises UTF-8 and does not check it: find the rows that break the promise.
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0], ""
            except UnicodeDecodeError as error:
                yield None, f"byte 0x{error.object[error.start]:02x} in a text is not UTF-8"
        return
    yield from ((value, "") for value in values)


def _hub_rows(dataset: HubDataset) -> Iterator[Row]:
    import datasets
    import datasets.exceptions

    where = f"{dataset.name}@{dataset.revision}#{dataset.split}"
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            dataset.name, revision=dataset.revision, split=dataset.split, streaming=True
        )
        for number, value in enumerate(rows, 1):
            yield Row(dataset.name, number, dict(value), counts_lines=False)
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
