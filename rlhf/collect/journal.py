"""The journal of answers: one JSON line each, on the disk before anybody hears that it was taken."""

import errno
import fcntl
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from rlhf.collect.annotation import Answer, Ranking
from rlhf.errors import DiskFullError, LeaseHeldError, RecordError, RequestError, TryAgainError


class Journal:
    """A file of answers that only grows, held by one process at a time.

    A line that was cut off when the program or the machine died is removed and told in ``notice``: its answer was never
    acknowledged.

    Raises:
        LeaseHeldError: another process holds the file.
        RequestError: the file cannot be opened.
        RecordError: a line is no answer.

    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: list[Answer] = []
        """What the file held when it was opened."""
        self.notice = ""
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            where = "name a file in a folder that is there and can be written"
            raise RequestError(f"answers cannot be kept: {error.strerror}", str(path), where) from error
        try:
            self._hold()
            sync(path.parent)
            self._size = self._read()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._sequence = len(self.answers)
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go, and with it the lock."""
        os.close(self._descriptor)

    def append(self, row: str, annotator: str, ranking: Ranking | None) -> Answer:
        """Write an answer; it is on the disk when this returns.

        Raises:
            DiskFullError, TryAgainError: it is not, and may be given again.

        """
        answer = Answer(
            sequence=self._sequence + 1, row=row, annotator=annotator, ranking=ranking, skipped=ranking is None
        )
        line = _line(answer)
        with unfinished_writes_told(self.path):
            if self._failed:
                # What an earlier attempt left half-written would run into this line.
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

    def _hold(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeaseHeldError(
                "another rlhf annotate keeps its answers in the same file",
                str(self.path),
                "open its page, end it with Ctrl-C, or name another OUT",
            ) from None

    def _read(self) -> int:
        """Read the answers; the size of the file without what was cut off."""
        data = self.path.read_bytes()
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            self.answers.append(self._parse(number, line))
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
        # Whole, but for its end: whoever edited the file by hand left that out.
        self.answers.append(self._parse(number, rest))
        self._write(b"\n")
        return len(data) + 1

    def _parse(self, number: int, line: bytes) -> Answer:
        try:
            answer = Answer.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            problem = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        else:
            if answer.sequence == number:
                return answer
            problem = f"its sequence is {answer.sequence}"
        raise RecordError(
            f"the line is no answer of rlhf annotate: {problem}",
            f"{self.path}:{number}",
            "put the file back as it was, or name another OUT",
        )


@contextmanager
def unfinished_writes_told(path: Path) -> Generator[None]:
    """Turn what the operating system says of a write into an error of ours."""
    try:
        yield
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else TryAgainError
        raise kind(f"the file could not be written: {error.strerror}", str(path), "make room or mend it") from error


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(answer: Answer) -> bytes:
    return (json.dumps(answer.model_dump(), ensure_ascii=False) + "\n").encode()
