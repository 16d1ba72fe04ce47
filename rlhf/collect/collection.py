"""Rows, journal and result of one annotation, together."""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from rlhf.collect.annotation import Annotation, Answer, Ranking, renamed, shown_order
from rlhf.collect.journal import Journal, sync, unfinished_writes_told
from rlhf.collect.response_sets import read_sets
from rlhf.data.jsonl import write_jsonl
from rlhf.errors import NextCommand, RecordError, RequestError

OUT_SUFFIX = ".jsonl"
JOURNAL_SUFFIX = ".answers.jsonl"


class Exported(NamedTuple):
    """What the result holds."""

    sets: int
    rankings: int
    annotators: int


class StaleAnswerError(Exception):
    """An answer was given to a page that did not show the newest one."""


class Collection:
    """The rows of ``source``, everybody's answers in the journal beside ``out``, and comparison sets in ``out``.

    Use it as a context manager: the journal is held from the beginning to the end. Without ``create`` there must be
    one already.

    Raises:
        RecordError, SettingsError, RequestError, LeaseHeldError: the files do not fit each other, or are in use.

    """

    def __init__(self, source: str, out: Path, *, create: bool = True) -> None:
        self.out = out
        self.annotation = Annotation(read_sets(source))
        journal = journal_beside(out)
        if out.exists() and not journal.exists():
            raise RequestError(
                "the file to write is there already, and was not made by rlhf annotate",
                f"{out} (no {journal.name} beside it)",
                "name another OUT",
            )
        if not create and not journal.exists():
            raise RequestError("there are no answers", str(journal), NextCommand("annotate", (str(source), str(out))))
        self.journal = Journal(journal)
        self.notices = [self.journal.notice] if self.journal.notice else []
        try:
            self._take_up(source)
        except BaseException:
            self.journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.journal.close()

    def answer(self, annotator: str, row: str, positions: Ranking | None, replaces: int) -> Answer:
        """Keep an answer, on the disk when this returns; to give the newest one again changes nothing.

        positions  the ranking by positions on the annotator's page; None skips the row
        replaces   the sequence of the answer that the page showed, 0 for none

        Raises:
            StaleAnswerError: there is a newer answer than that, and another one.
            DiskFullError, TryAgainError: it could not be written, and may be given again.

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
        # The journal's lock makes this the only writer, so that one name for what is unfinished is enough.
        unfinished = self.out.with_name(f".{self.out.name}.unfinished")
        with unfinished_writes_told(self.out):
            write_jsonl(unfinished, sets)
            sync(unfinished)
            unfinished.replace(self.out)
            sync(self.out.parent)
        names = {name for one in sets for name in one.annotators or []}
        return Exported(len(sets), sum(len(one.rankings or []) for one in sets), len(names))

    def _take_up(self, source: str) -> None:
        for answer in self.journal.answers:
            if answer.row in self.annotation.sets and (problem := self.annotation.problem(answer.row, answer.ranking)):
                where = f"{self.journal.path}:{answer.sequence}"
                raise RecordError(problem, where, "put the file back as it was, or name another OUT")
            self.annotation.add(answer)
        if not (strays := len(self.annotation.strays)):
            return
        if not self.annotation.annotators:
            raise RequestError(
                f"the answers that are there were given to other rows than those of {source}",
                str(self.journal.path),
                "name the file of rows that they were given to, or another OUT",
            )
        self.notices.append(
            f"{self.journal.path}: {strays} answered row{'' if strays == 1 else 's'} not in {source}; the answers stay "
            f"there and are left out of {self.out}"
        )


def journal_beside(out: Path) -> Path:
    """The journal of a result.

    Raises:
        RequestError: ``out`` is no name for a file of records.

    """
    if out.suffix != OUT_SUFFIX or out.is_dir():
        raise RequestError(f"the file to write must end in {OUT_SUFFIX}", str(out), f"name it {out.stem}{OUT_SUFFIX}")
    return out.with_suffix(JOURNAL_SUFFIX)
