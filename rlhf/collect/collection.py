"""A collection of sets of responses that people rank, and the journal of their answers."""

import fcntl
import json
import os
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from rlhf.collect.annotation import Annotation, Answer, Ranking, renamed, shown_order
from rlhf.data.readers import malformed, read_source
from rlhf.data.records import ComparisonSet, PreferencePair, Reason, ResponseSet, parse_record, write_jsonl
from rlhf.errors import DiskFullError, LeaseHeldError, NextCommand, RecordError, RequestError, TryAgainError, is_no_room
from rlhf.store import digest_of
from rlhf.store.backend import sync


def held(path: Path, by_another: LeaseHeldError) -> int:
    """Open a file that only grows, for this process alone; return its descriptor. Closing it releases the lock.

    by_another  raised where another process holds it

    Raises:
        RequestError: the file cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        next_step = "name a file in a folder that is there and can be written"
        raise RequestError(f"answers cannot be kept: {error.strerror}", str(path), next_step) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sync(path.parent)
    except BlockingIOError:
        os.close(descriptor)
        raise by_another from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_through(descriptor: int, data: bytes) -> None:
    """Write all of the data; it is on the disk when this returns."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)


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
        self._descriptor = held(
            path,
            LeaseHeldError(
                "another rlhf annotate keeps its answers in the same file",
                str(path),
                "open its page, end it with Ctrl-C, or name another OUT",
            ),
        )
        try:
            self._size = self._read()
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
        write_through(self._descriptor, data)

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


_COMPARISON_FIELDS = (ComparisonSet.model_fields.keys() | PreferencePair.model_fields) - ResponseSet.model_fields.keys()


def read_sets(source: str) -> dict[str, ResponseSet]:
    """Read the sets of a source in its order, by their names; of rows with the same prompt and responses, the first.

    Of comparison sets and pairs, the prompt, the responses and the models are read. Raises RecordError if a row is
    malformed or there are none, SettingsError or IndexUnreachableError if the source cannot be read at all.
    """
    sets: dict[str, ResponseSet] = {}
    bad: list[str] = []
    total = 0
    # The responses to held-out prompts are compared too.
    for row in read_source(source, mixes_splits=True):
        total += 1
        is_compared = isinstance(row.value, Mapping) and not _COMPARISON_FIELDS.isdisjoint(row.value)
        if row.problem:
            record = [Reason("", row.problem)]
        else:
            record = parse_record(row.value, ComparisonSet if is_compared else ResponseSet)
        if isinstance(record, list):
            bad.append(f"{row.place}: {'; '.join(map(str, record))}")
        else:
            if isinstance(record, ComparisonSet):
                record = ResponseSet(prompt=record.prompt, responses=record.responses, models=record.models)
            sets.setdefault(name_of(record), record)
    if bad:
        raise malformed(bad, total, "", 'correct them: a row is {"prompt": …, "responses": [two or more]}')
    if not sets:
        raise RecordError("there are no rows", source, "name a file that has some")
    return sets


def name_of(responses: ResponseSet | ComparisonSet) -> str:
    """Return a set's name, a digest of its prompt and responses: answers stay with the set wherever its row moves."""
    content = responses.model_dump(include={"prompt", "responses"})
    return digest_of([content["prompt"], content["responses"]])


def read_whole_lines(path: Path) -> list[Any]:
    """Read the lines of a JSON Lines file, without a last one that a kill cut off; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


class Exported(NamedTuple):
    """Counts of the exported result."""

    sets: int
    rankings: int
    annotators: int


class StaleAnswerError(Exception):
    """An answer was given on a page that did not show the newest answer."""


class Collection(AbstractContextManager["Collection"]):
    """The rows of ``source``, all answers in the journal beside ``out``, and comparison sets in ``out``.

    Use it as a context manager: the journal is held from the beginning to the end. Without ``create`` the journal must
    exist. Raises RecordError, SettingsError, RequestError or LeaseHeldError if the files do not fit each other, or are
    in use.
    """

    def __init__(self, source: str, out: Path, *, create: bool = True) -> None:
        self.out = out
        self.annotation = Annotation(read_sets(source))
        if out.suffix != ".jsonl" or out.is_dir():
            raise RequestError("the file to write must end in .jsonl", str(out), f"name it {out.stem}.jsonl")
        journal = out.with_suffix(".answers.jsonl")
        if out.exists() and not journal.exists():
            raise RequestError(
                "the file to write is there already, and was not made by rlhf annotate",
                f"{out} (no {journal.name} beside it)",
                "name another OUT",
            )
        if not create and not journal.exists():
            raise RequestError("there are no answers", str(journal), NextCommand("annotate", (str(source), str(out))))
        self.journal = AnnotationJournal(journal)
        self.notices = [self.journal.notice] if self.journal.notice else []
        try:
            self._add_answers(source)
        except BaseException:
            self.journal.close()
            raise

    def _add_answers(self, source: str) -> None:
        """Add the journal's answers; those to other rows than those of ``source`` are counted in a notice."""
        for answer in self.journal.answers:
            if answer.row in self.annotation.sets and (problem := self.annotation.problem(answer.row, answer.ranking)):
                where = f"{self.journal.path}:{answer.sequence}"
                raise RecordError(problem, where, "put the file back as it was, or name another OUT")
            self.annotation.add(answer)
        if not (strays := len(self.annotation.strays)):
            return
        if not self.annotation.annotators:
            raise RequestError(
                f"the existing answers were given to other rows than those of {source}",
                str(self.journal.path),
                "name the file of rows that they were given to, or another OUT",
            )
        self.notices.append(
            f"{self.journal.path}: {strays} answered row{'' if strays == 1 else 's'} not in {source}; the answers stay "
            f"there and are left out of {self.out}"
        )

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def answer(self, annotator: str, row: str, positions: Ranking | None, replaces: int) -> Answer:
        """Keep an answer, on the disk when this returns; to give the newest one again changes nothing.

        positions  the ranking by positions on the annotator's page; None skips the row
        replaces   the sequence of the answer that the page showed, 0 for none

        Raises StaleAnswerError if there is a newer and different answer; DiskFullError or TryAgainError if the answer
        could not be written, and may be given again.
        """
        shown = shown_order(annotator, row, len(self.annotation.sets[row].responses))
        ranking = None if positions is None else renamed(positions, shown)
        newest = self.annotation.answer(annotator, row)
        if newest is not None and newest.ranking == ranking:
            return newest
        if replaces != (newest.sequence if newest else 0):
            raise StaleAnswerError
        answer = self.journal.append(row, annotator, ranking)
        self.annotation.add(answer)
        return answer

    def export(self) -> Exported:
        """Write the comparison sets to ``out``: readers see the old file or the new one."""
        sets = self.annotation.comparison_sets()
        # The journal's lock makes this the only writer, so that a single name for the unfinished file is enough.
        unfinished = self.out.with_name(f".{self.out.name}.unfinished")
        with writing(self.out):
            write_jsonl(unfinished, sets)
            sync(unfinished)
            unfinished.replace(self.out)
            sync(self.out.parent)
        names = {name for compared in sets for name in compared.annotators or []}
        return Exported(len(sets), sum(len(compared.rankings or []) for compared in sets), len(names))
