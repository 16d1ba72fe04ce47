"""The journal of answers: one JSON line each, on the disk before the answer is acknowledged."""

import fcntl
import json
import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pydantic import ValidationError

from rlhf.collect.annotation import Answer, Ranking
from rlhf.errors import DiskFullError, LeaseHeldError, RecordError, RequestError, TryAgainError, is_no_room
from rlhf.store.backend import sync


class AnnotationJournal(AbstractContextManager["AnnotationJournal"]):
    """A file of answers that only grows, held by one process at a time.

    A line that was cut off when the program or the machine died is removed and reported in ``notice``: its answer was
    never acknowledged. Raises LeaseHeldError if another process holds the file, RequestError if it cannot be opened,
    RecordError if a line is no answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[Answer] = []
        """The answers that the file held when it was opened."""
        self.notice = ""
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            next_step = "name a file in a folder that is there and can be written"
            raise RequestError(f"answers cannot be kept: {error.strerror}", str(path), next_step) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sync(path.parent)
            self._size = self._read()
        except BlockingIOError:
            self.close()
            raise LeaseHeldError(
                "another rlhf annotate keeps its answers in the same file",
                str(path),
                "open its page, end it with Ctrl-C, or name another OUT",
            ) from None
        except BaseException:
            self.close()
            raise
        self._sequence = len(self.answers)
        self._failed = False

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which releases the lock."""
        os.close(self._descriptor)

    def append(self, row: str, annotator: str, ranking: Ranking | None) -> Answer:
        """Write an answer; it is on the disk when this returns.

        Raises DiskFullError or TryAgainError if it is not; the answer may then be given again.
        """
        answer = Answer(
            sequence=self._sequence + 1, row=row, annotator=annotator, ranking=ranking, skipped=ranking is None
        )
        line = (json.dumps(answer.model_dump(), ensure_ascii=False) + "\n").encode()
        with writing(self.path):
            if self._failed:
                # The half of a line that an earlier try left would run into this line.
                os.ftruncate(self._descriptor, self._size)
            self._failed = True
            self._write(line)
            self._failed = False
        self._size += len(line)
        self._sequence += 1
        return answer

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)

    def _read(self) -> int:
        """Read the answers; return the size of the file without a line that was cut off."""
        data = self.path.read_bytes()
        *lines, rest = data.split(b"\n")
        self.answers = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        if not rest:
            return len(data)
        number = len(lines) + 1
        try:
            json.loads(rest)
        except ValueError:
            self.notice = (
                f"{self.path}:{number}: the last line was cut off when the program or the machine died, and is left "
                "out; its answer was never acknowledged, and the page that gave it sends it again"
            )
            os.ftruncate(self._descriptor, len(data) - len(rest))
            os.fsync(self._descriptor)
            return len(data) - len(rest)
        # Whole, but without its line end: the file was edited by hand.
        self.answers.append(self._parse(number, rest))
        self._write(b"\n")
        return len(data) + 1

    def _parse(self, number: int, line: bytes) -> Answer:
        try:
            answer = Answer.model_validate_json(line)
            if answer.sequence == number:
                return answer
            problem = f"its sequence is {answer.sequence}"
        except ValidationError as error:
            problem = described(error, " ")
        raise RecordError(
            f"the line is no answer of rlhf annotate: {problem}",
            f"{self.path}:{number}",
            "put the file back as it was, or name another OUT",
        )


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn an operating-system error of a write into DiskFullError or TryAgainError."""
    try:
        yield
    except OSError as error:
        kind = DiskFullError if is_no_room(error) else TryAgainError
        raise kind(
            f"the file could not be written: {error.strerror}", str(path), "make room, or correct the cause"
        ) from error


def described(error: ValidationError, separator: str) -> str:
    """Return the first problem of a document: its field and what is wrong there."""
    problem = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, problem['loc']))}{separator}{problem['msg']}".strip()
