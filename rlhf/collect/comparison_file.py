"""A file of comparison sets that grows by one whole line at a time, so that a session that is killed loses nothing."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import ValidationError

from rlhf.collect.collection import described, held, name_of, write_through, writing
from rlhf.data.records import ComparisonSet, ResponseSet, to_line
from rlhf.errors import LeaseHeldError, RecordError, RequestError


class ComparisonFile(AbstractContextManager["ComparisonFile"]):
    """The file, held by one process at a time; a last line that was cut off is removed, since it was never whole.

    Raises RequestError if the file cannot be opened or its name does not end in .jsonl, LeaseHeldError if another
    process holds it, RecordError if a line is no comparison set.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.suffix != ".jsonl" or path.is_dir():
            raise RequestError("the file to save to must end in .jsonl", str(path), f"name it {path.stem}.jsonl")
        other = LeaseHeldError("another rlhf compare saves to the same file", str(path), "name another")
        self._descriptor = held(path, other)
        try:
            self._sets = {(name_of(row), tuple(row.models or ())): row for row in self._read()}
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which releases the lock."""
        os.close(self._descriptor)

    def saved(self, responses: ResponseSet) -> ComparisonSet | None:
        """Return the set with the same prompt, responses and models, if it is in the file with winners."""
        compared = self._sets.get((name_of(responses), tuple(responses.models or ())))
        return compared if compared is not None and compared.winners else None

    def append(self, compared: ComparisonSet) -> None:
        """Write a set; it is on the disk when this returns."""
        with writing(self._path):
            write_through(self._descriptor, to_line(compared).encode())

    def _read(self) -> list[ComparisonSet]:
        data = self._path.read_bytes()
        *lines, rest = data.split(b"\n")
        try:
            json.loads(rest or b"null")
        except ValueError:
            os.ftruncate(self._descriptor, len(data) - len(rest))
            rest = b""
        if rest:  # whole, but without its line end: the file was edited by hand
            lines.append(rest)
            os.write(self._descriptor, b"\n")
        return [self._parsed(number, line) for number, line in enumerate(lines, start=1) if line.strip()]

    def _parsed(self, number: int, line: bytes) -> ComparisonSet:
        try:
            return ComparisonSet.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(
                f"the line is no comparison set: {described(error, ' ')}",
                f"{self._path}:{number}",
                "correct it, or name another file",
            ) from error
