"""A collection: sets of responses, sampled or written, that annotators rank."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.collect.annotation import Annotation, Answer, Ranking, renamed, shown_order
from rlhf.collect.journal import Journal, sync, unfinished_writes_told
from rlhf.data.readers import read_rows
from rlhf.data.records import ComparisonSet, PreferencePair, Reason, ResponseSet, parse_record, write_jsonl
from rlhf.data.validation import malformed
from rlhf.errors import NextCommand, RecordError, RequestError
from rlhf.store import digest_of
from rlhf.zero import group

_TELL_OF_COMPARISONS = (
    ComparisonSet.model_fields.keys() | PreferencePair.model_fields
) - ResponseSet.model_fields.keys()


def read_sets(source: str) -> dict[str, ResponseSet]:
    """Read the sets of a source in its order, by their names; of rows with the same prompt and responses, the first.

    Comparison sets are taken too: what they already say of their responses is left out.

    Raises:
        RecordError: a row is malformed, or there are none.
        SettingsError, IndexUnreachableError: the source cannot be read at all.

    """
    sets: dict[str, ResponseSet] = {}
    bad: list[str] = []
    total = 0
    # People compare the responses to held-out prompts too.
    for row in read_rows(source, mixes_splits=True):
        total += 1
        found = [Reason("", row.problem)] if row.problem else _parse(row.value)
        if isinstance(found, list):
            bad.append(f"{row.place}: {'; '.join(map(str, found))}")
        else:
            sets.setdefault(name_of(found), found)
    if bad:
        raise malformed(bad, total, "", 'correct them: a row is {"prompt": …, "responses": [two or more]}')
    if not sets:
        raise RecordError("there are no rows", source, "name a file that has some")
    return sets


def name_of(responses: ResponseSet | ComparisonSet) -> str:
    """Name a set by its content, so that answers stay with it wherever its row moves."""
    content = responses.model_dump(include={"prompt", "responses"})
    return digest_of([content["prompt"], content["responses"]])


def _parse(value: Any) -> ResponseSet | list[Reason]:
    if not isinstance(value, Mapping) or _TELL_OF_COMPARISONS.isdisjoint(value):
        return parse_record(value, ResponseSet)
    found = parse_record(value, ComparisonSet)
    if isinstance(found, list):
        return found
    return ResponseSet(prompt=found.prompt, responses=found.responses, models=found.models)


class Written:
    """Texts by their sample's global index, from 0 on; every rank knows all of them, and rank 0 keeps them in a file.

    To make one is a collective. Of all attempts at the stage's key, the one that got furthest is continued.
    """

    def __init__(self, context: Context[Any]) -> None:
        self._path, self._output = context.folder.written, context.output
        self.texts: list[str] = group.from_main(lambda: self._take_up(context.attempts))

    def left(self, samples: range, at_once: int) -> Iterator[range]:
        """The samples that are not written yet, ``at_once`` a rank; earlier ones than ``samples`` must be there."""
        step = at_once * group.world_size()
        for first in range(max(samples.start, len(self.texts)), samples.stop, step):
            yield range(first, min(first + step, samples.stop))

    def add(self, texts: Sequence[str]) -> None:
        """Keep the next samples' texts."""
        self.texts += texts
        if group.is_main():
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(text) + "\n" for text in texts)

    def write(self, name: str, sets: Sequence[ResponseSet]) -> None:
        """Make a file of the result, once for all ranks."""
        if group.is_main():
            write_jsonl(self._output / name, sets)

    def _take_up(self, attempts: Sequence[Path]) -> list[str]:
        found = max((_read(AttemptFolder(attempt).written) for attempt in attempts), key=len, default=[])
        self._path.write_text("".join(json.dumps(text) + "\n" for text in found), encoding="utf-8")
        return found


def _read(path: Path) -> list[str]:
    if not path.exists():
        return []
    # What a kill left half-written at the end is written again.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


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
