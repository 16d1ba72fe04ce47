"""A file of comparison sets that grows by one whole line at a time, so that a session that is killed loses nothing."""

import fcntl
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import ValidationError

from rlhf.collect.collection import described, name_of, writing
from rlhf.data.records import ComparisonSet, ResponseSet, to_line
from rlhf.errors import LeaseHeldError, RecordError, RequestError
from rlhf.store.backend import sync


class ComparisonFile(AbstractContextManager["ComparisonFile"]):
    """The file, held by one process at a time; a last line that was cut off is removed, since it was never whole.

    Raises RequestError if the file cannot be opened or its name does not end in .jsonl, LeaseHeldError if another
    process holds it, RecordError if a line is no comparison set.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.suffix != ".jsonl" or path.is_dir():
            raise RequestError("the file to save to must end in .jsonl", str(path), f"name it {path.stem}.jsonl")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            next_step = "name a file in a folder that is there and can be written"
            raise RequestError(f"answers cannot be saved: {error.strerror}", str(path), next_step) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync(path.parent)
            self._sets = {(name_of(one), tuple(one.models or ())): one for one in self._read()}
        except BlockingIOError:
            self.close()
            raise LeaseHeldError("another rlhf compare saves to the same file", str(path), "name another") from None
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
        found = self._sets.get((name_of(responses), tuple(responses.models or ())))
        return found if found is not None and found.winners else None

    def append(self, compared: ComparisonSet) -> None:
        """Write a set; it is on the disk when this returns."""
        rest = memoryview(to_line(compared).encode())
        with writing(self._path):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)

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
