"""The records of a source, each row checked, and the bad ones set aside with their reasons."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Generic

from rlhf.data.forms import FormReader
from rlhf.data.imports.convert import refuse_exports
from rlhf.data.readers import Row, read_rows
from rlhf.data.records import R, Reason
from rlhf.errors import RecordError

NAMED_BAD_ROWS = 3
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
        if len(self._named) < NAMED_BAD_ROWS:
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
