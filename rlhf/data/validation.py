"""A source of records checked on its own, before any pipeline reads it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlhf.data.forms import FormReader, model_of
from rlhf.data.imports.convert import refuse_exports
from rlhf.data.readers import read_rows
from rlhf.data.records import ComparisonSet, Demonstration, JudgeRating, Prompt, Reason
from rlhf.errors import RecordError

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
