"""Check records, during the data stage and for `rlhf validate`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple

from rlhf.data.forms import FormReader, model_of
from rlhf.data.imports.convert import refuse_exports
from rlhf.data.readers import Row, read_rows
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, R, Reason
from rlhf.errors import RecordError

BAD_ROWS_NAMED_BY_DATA = 3
"""Bad rows that an error names; the quarantine file has them all."""


class RecordReader(Generic[R]):
    """The records of a source, one by one; every row is checked.

    A bad row goes to the quarantine file, one JSON object a line with its file, line (or row), reasons and the row
    itself. The file is made only when there is a bad row. ``good`` and ``bad`` count the rows seen so far; ``forms``
    says as what they were read.
    """

    def __init__(self, source: str, model: type[R], quarantine: Path, max_bad_fraction: float = 0.0) -> None:
        self.source = source
        self.model = model
        self.quarantine = quarantine
        self.max_bad_fraction = max_bad_fraction
        self.good = 0
        self.bad = 0
        self.forms = FormReader()
        self._named: list[str] = []

    def __iter__(self) -> Iterator[R]:
        """Read the source from its beginning.

        Raises:
            RecordError: after the last row, when more than ``max_bad_fraction`` of the rows are bad or none is good;
                or at a row that must be converted first.
            SettingsError, IndexUnreachableError: the source cannot be read at all.

        """
        self.good = self.bad = 0
        self.forms = FormReader()
        self._named = []
        self.quarantine.unlink(missing_ok=True)
        for row in read_rows(self.source):
            refuse_exports(row, self.source)
            record = [Reason("", row.problem)] if row.problem else self.forms.parse(row.value, self.model)
            if isinstance(record, list):
                self._refuse(row, record)
            else:
                self.good += 1
                yield record
        self._judge()

    def _refuse(self, row: Row, reasons: list[Reason]) -> None:
        self.bad += 1
        if len(self._named) < BAD_ROWS_NAMED_BY_DATA:
            self._named.append(f"{row.place}: {'; '.join(map(str, reasons))}")
        entry = {
            "file": row.file,
            "line" if row.counts_lines else "row": row.number,
            "reasons": [reason._asdict() for reason in reasons],
            "content": row.value,
        }
        with self.quarantine.open("a", encoding="ascii") as file:
            # ASCII escapes carry what is not UTF-8; what a Parquet file holds beyond JSON's types is shown as text.
            file.write(json.dumps(entry, default=str) + "\n")

    def _judge(self) -> None:
        total = self.good + self.bad
        if self.bad > self.max_bad_fraction * total or (self.bad and not self.good):
            more = f"\n  and {self.bad - len(self._named)} more" if self.bad > len(self._named) else ""
            raise RecordError(
                f"{self.bad} of {total} rows are malformed",
                "\n  ".join(self._named) + more,
                f"correct them (all are in {self.quarantine}), or allow some with data.max_bad_fraction",
            )
        if not total:
            raise RecordError("there are no rows", self.source, "name a source that has some")


KINDS = {"demonstrations": Demonstration, "comparisons": ComparisonSet, "prompts": Prompt, "judge": JudgeRating}
"""What the rows of a source may be, by the data stage's name for it."""

NAMED_BAD_ROWS = 20
"""Bad rows that the error names: there is no quarantine file to look into."""


class Checked(NamedTuple):
    """What a well-formed source holds."""

    kind: str
    rows: int
    forms: str
    """As what rows were read that are not in our own form; empty where all are."""


def validate_file(source: str, kind: str | None) -> Checked:
    """Check every row of a file, of a folder's files or of a hub dataset.

    ``kind`` is one of ``KINDS``; None has the fields of the first readable row tell it, for all rows.

    Raises:
        RecordError: a row is malformed, or there are none.
        SettingsError, IndexUnreachableError: the source cannot be read at all.
    """
    told, total = kind, 0
    bad: list[str] = []
    forms = FormReader()
    for row in read_rows(source):
        total += 1
        refuse_exports(row, source)
        if told is None and not row.problem and isinstance(row.value, Mapping):
            told = next(name for name, model in KINDS.items() if model is model_of(row.value))
        found = [Reason("", row.problem)] if row.problem else forms.parse(row.value, KINDS[told or "prompts"])
        if isinstance(found, list):
            bad.append(f"{row.place}: {'; '.join(map(str, found))}")
    if bad:
        correct = "correct them" if kind else f"correct them, or say with --kind what they are: {', '.join(KINDS)}"
        raise malformed(bad, total, f" as {told}" if told else "", correct)
    if told is None or not total:
        raise RecordError("there are no rows", source, "name a file that has some")
    return Checked(told, total, forms.line())


def malformed(bad: Sequence[str], total: int, as_what: str, next_step: str) -> RecordError:
    """Make the error that counts the bad rows and names the first of them, each by its place and reasons."""
    more = f"\n  and {len(bad) - NAMED_BAD_ROWS} more" if len(bad) > NAMED_BAD_ROWS else ""
    what = f"{len(bad)} of {total} rows are malformed{as_what}"
    return RecordError(what, "\n  ".join(bad[:NAMED_BAD_ROWS]) + more, next_step)
