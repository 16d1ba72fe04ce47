"""Check records, during the data stage and for `rlhf data validate`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple

from rlhf.config.base import FILE_SUFFIXES, is_local
from rlhf.data.convert import refuse_exports
from rlhf.data.forms import FormReader, model_of
from rlhf.data.readers import malformed, read_source
from rlhf.data.record_files import record_files
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, R, Reason
from rlhf.errors import RecordError


@dataclass
class RecordReader(Generic[R]):
    """Iterate over the records of a source; every row is checked.

    A bad row goes to the quarantine file, one JSON object a line with its file, line (or row), reasons and the row
    itself. The file is made only when there is a bad row. ``good`` and ``bad`` count the rows read so far; ``forms``
    counts them by their forms.
    """

    source: str
    model: type[R]
    quarantine: Path
    max_bad_fraction: float = 0.0
    good: int = field(default=0, init=False)
    bad: int = field(default=0, init=False)
    forms: FormReader = field(default_factory=FormReader, init=False)

    def __iter__(self) -> Iterator[R]:
        """Read the source from its beginning.

        Raises:
            RecordError: after the last row, when more than ``max_bad_fraction`` of the rows are bad or none is good;
                or at a row that must be converted first.
            SettingsError, IndexUnreachableError: the source cannot be read at all.

        """
        self.good = self.bad = 0
        self.forms = FormReader()
        self.quarantine.unlink(missing_ok=True)
        named: list[str] = []
        for row in read_source(self.source):
            refuse_exports(row, self.source)
            record = [Reason("", row.problem)] if row.problem else self.forms.parse(row.value, self.model)
            if not isinstance(record, list):
                self.good += 1
                yield record
                continue
            self.bad += 1
            if self.bad <= 3:  # the quarantine file has all of them
                named.append(f"{row.place}: {'; '.join(map(str, record))}")
            entry = {
                "file": row.file,
                "line" if row.counts_lines else "row": row.number,
                "reasons": [reason._asdict() for reason in record],
                "content": row.value,
            }
            with self.quarantine.open("a", encoding="ascii") as file:
                # ASCII escapes represent bytes that are not UTF-8; values of Parquet beyond JSON's types become text.
                file.write(json.dumps(entry, default=str) + "\n")
        total = self.good + self.bad
        if self.bad > self.max_bad_fraction * total or (self.bad and not self.good):
            next_step = f"correct them (all are in {self.quarantine}), or allow some with data.max_bad_fraction"
            raise malformed(named, total, "", next_step, count=self.bad)
        if not total:
            raise RecordError("there are no rows", self.source, "name a source that has some")


KINDS = {"demonstrations": Demonstration, "comparisons": ComparisonSet, "prompts": Prompt, "judge": JudgeRating}
"""The kinds of rows, by the data stage's names for them."""

_KIND_OF_NAME = {kind + suffix: kind for kind in KINDS for suffix in ("", *FILE_SUFFIXES)}


def kinds_in(source: str) -> dict[str, str | None]:
    """Return what to read as one kind of rows, and the kind where a name says it, else None.

    That is the source itself; or all that a folder holds, each by itself, where a file or a folder in it has the name
    of a kind, as those that `rlhf init` takes.

    Raises:
        SettingsError, RequestError: there is nothing to read, or something that is not read.
    """
    folder = Path(source).expanduser()
    if not is_local(source) or (files := record_files(folder, mixes_splits=True)) == [folder]:
        return {source: None}
    names = dict.fromkeys(file.relative_to(folder).parts[0] for file in files)
    kinds = {str(Path(source, name)): _KIND_OF_NAME.get(name.casefold()) for name in names}
    return kinds if any(kinds.values()) else {source: None}


class Checked(NamedTuple):
    """The content of a well-formed source."""

    kind: str
    rows: int
    forms: str
    """The forms of rows that are not in our own form; empty where all are."""


def validate_file(source: str, kind: str | None) -> Checked:
    """Check every row of a file, of a folder's files or of a hub dataset.

    ``kind`` is one of ``KINDS``; where it is None, the fields of the first readable row decide it, for all rows.

    Raises:
        RecordError: a row is malformed, or there are none.
        SettingsError, IndexUnreachableError: the source cannot be read at all.
    """
    checked_as, total = kind, 0
    bad: list[str] = []
    forms = FormReader()
    for row in read_source(source):
        total += 1
        refuse_exports(row, source)
        if checked_as is None and not row.problem and isinstance(row.value, Mapping):
            checked_as = next(name for name, model in KINDS.items() if model is model_of(row.value))
        record = [Reason("", row.problem)] if row.problem else forms.parse(row.value, KINDS[checked_as or "prompts"])
        if isinstance(record, list):
            bad.append(f"{row.place}: {'; '.join(map(str, record))}")
    if bad:
        correct = "correct them" if kind else f"correct them, or say with --kind what they are: {', '.join(KINDS)}"
        raise malformed(bad, total, f" as {checked_as}" if checked_as else "", correct)
    if checked_as is None or not total:
        raise RecordError("there are no rows", source, "name a file that has some")
    return Checked(checked_as, total, forms.line())
