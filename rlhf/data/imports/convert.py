"""An annotation tool's export as a file of comparison sets."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config.nearest import suggestion
from rlhf.data.imports import argilla, label_studio
from rlhf.data.imports.answers import Annotated, MalformedError
from rlhf.data.imports.layout import Layout, Wanted, find_layout
from rlhf.data.jsonl import to_line
from rlhf.data.readers import Row, read_rows
from rlhf.data.records import ComparisonSet, Reason, parse_record
from rlhf.errors import RecordError, RequestError

NAMED_BAD_RECORDS = 20
"""Bad records that the error names: there is no quarantine file to look into."""

Records = Sequence[Mapping[str, Any]]


class Tool(NamedTuple):
    """How one annotation tool's records are read."""

    recognises: Callable[[Mapping[str, Any]], bool]
    fields_of: Callable[[Records], Mapping[str, Any]]
    read: Callable[[Records, Layout, Wanted], Annotated]
    belongs: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
    """Whether a record goes on about what the previous one began."""


TOOLS = {
    "argilla": Tool(argilla.recognises, argilla.fields_of, argilla.read, lambda *_: False),
    "label-studio": Tool(label_studio.recognises, label_studio.fields_of, label_studio.read, label_studio.belongs),
}


class Converted(NamedTuple):
    """What became of an export."""

    records: int
    sets: int
    annotators: int
    unknown_status: int
    """Answers taken although the export does not say whether they were submitted."""
    left_out: Counter[str]
    """How much was not written, by what it is."""


def convert_file(source: str, target: Path, tool: str | None, wanted: Wanted) -> Converted:
    """Write the comparison sets of an export, or nothing where one of its records is malformed.

    ``tool`` is one of ``TOOLS``; None has the first readable record tell it.

    Raises:
        RequestError: the target is there already or cannot be; a wanted field or question is in no record.
        RecordError: a record is malformed, the tool is not recognised, or nothing compares responses.
        SettingsError, IndexUnreachableError: the source cannot be read at all.

    """
    if target.exists():
        raise RequestError("there is a file already, and it would be lost", str(target), "name another, or remove it")
    if not target.parent.is_dir():
        raise RequestError("there is no such folder", str(target.parent), f"mkdir -p {target.parent}")
    rows = read_rows(source)
    # Beside the target, so that moving it into place is one rename.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
        written = Path(folder) / target.name
        with written.open("w", encoding="utf-8", newline="\n") as file:
            conversion = _Conversion(source, tool, wanted)
            for one in conversion.sets(rows):
                file.write(to_line(one))
        converted = conversion.judged()
        written.replace(target)
    return converted


class _Conversion:
    """One pass over an export, and what it came upon."""

    def __init__(self, source: str, tool: str | None, wanted: Wanted) -> None:
        self.source = source
        self.wanted = wanted
        self.tool: Tool | None = TOOLS[tool] if tool else None
        self.fields: dict[str, Any] = {}
        self.layout: Layout | None = None
        self.records = 0
        self.written = 0
        self.unknown_status = 0
        self.annotators: set[str] = set()
        self.questions: set[str] = set()
        self.left_out = Counter[str]()
        self.bad: list[str] = []

    def sets(self, rows: Iterable[Row]) -> Iterator[ComparisonSet]:
        """Every record's comparison set; the malformed are noted and the empty counted."""
        for place, records in self._joined(rows):
            try:
                annotated = self._read(records, place)
                made = self._checked(annotated)
            except MalformedError as error:
                self._note(place, error.reason)
                continue
            self.questions |= annotated.questions
            self.left_out += annotated.left_out
            if made is not None:
                self.written += 1
                self.unknown_status += annotated.unknown_status
                self.annotators.update(made.annotators or ())
                yield made

    def _joined(self, rows: Iterable[Row]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
        """The records with their places; those that belong together at the place of the first."""
        place, together = "", list[Mapping[str, Any]]()
        for row in rows:
            self.records += 1
            # A whole JSON array may stand on one line, so that only the number finds the record.
            here = f"{row.place}, record {self.records}" if row.counts_lines else row.place
            if row.problem or not isinstance(row.value, Mapping):
                if together:
                    yield place, together
                    together = []
                problem = row.problem or f"a record must be an object with fields, not {type(row.value).__name__}"
                self._note(here, Reason("", problem))
                continue
            if together and self.tool is not None and self.tool.belongs(row.value, together[-1]):
                together.append(row.value)
                continue
            if together:
                yield place, together
            place, together = here, [row.value]
            self._recognise(row.value, here)
        if together:
            yield place, together

    def _note(self, place: str, reason: Reason) -> None:
        self.bad.append(f"{place}: {reason}")

    def _recognise(self, record: Mapping[str, Any], place: str) -> None:
        if self.tool is not None:
            return
        self.tool = next((tool for tool in TOOLS.values() if tool.recognises(record)), None)
        if self.tool is None:
            keys = ", ".join(map(str, record)) or "none"
            tools = " or ".join(TOOLS)
            raise RecordError(
                f"neither Argilla nor Label Studio writes such records; its fields are {keys}",
                place,
                f"name an export, or say --from {tools}; comparison sets need no converting",
            )

    def _read(self, records: list[Mapping[str, Any]], place: str) -> Annotated:
        assert self.tool is not None, "the first record told it"
        return self.tool.read(records, self._layout(self.tool.fields_of(records), place), self.wanted)

    def _layout(self, fields: Mapping[str, Any], place: str) -> Layout:
        """The layout by all fields seen so far: a record may lack optional ones, of which it has nothing to lose."""
        unseen = {
            name: value
            for name, value in fields.items()
            if name not in self.fields or (self.fields[name] is None and value is not None)
        }
        if self.layout is None or unseen:
            self.fields |= unseen
            try:
                self.layout = find_layout(self.fields, self.wanted)
            except MalformedError as error:
                next_step = "say which they are: --prompt FIELD --responses FIELD,FIELD"
                raise RecordError(error.reason.problem, place, next_step) from None
        return self.layout

    def _checked(self, annotated: Annotated) -> ComparisonSet | None:
        """The set of a record; None where it has none, which is counted."""
        assert self.layout is not None, "a record was read with it"
        if len(annotated.responses) < 2:
            self.left_out["records with fewer than two responses"] += 1
            return None
        if not annotated.compares:
            self.left_out["records that nobody compared"] += 1
            return None
        found = parse_record(annotated.as_row(), ComparisonSet)
        if isinstance(found, list):
            field, problem = found[0]
            raise MalformedError(_field_in_export(field, self.layout, list(annotated.responses)), problem)
        return found

    def judged(self) -> Converted:
        """What came of it all.

        Raises:
            RequestError: a wanted field or question is in no record.
            RecordError: a record is malformed, or nothing compares responses.

        """
        for option, names in (("--prompt", filter(None, [self.wanted.prompt])), ("--responses", self.wanted.responses)):
            for name in names:
                if self.fields and name not in self.fields:
                    raise RequestError(f"there is no field {name!r}", option, suggestion(name, self.fields))
        if self.bad:
            more = f"\n  and {len(self.bad) - NAMED_BAD_RECORDS} more" if len(self.bad) > NAMED_BAD_RECORDS else ""
            raise RecordError(
                f"{len(self.bad)} of {self.records} records are malformed, and nothing is written",
                "\n  ".join(self.bad[:NAMED_BAD_RECORDS]) + more,
                "correct them in the tool and export again",
            )
        if not self.records:
            raise RecordError("there are no records", self.source, "name a file that has some")
        for question in self.wanted.questions:
            if question not in self.questions:
                raise RequestError(
                    f"nobody answered a question {question!r}", "--question", suggestion(question, self.questions)
                )
        if not self.written:
            reasons = "; ".join(f"{count} {what}" for what, count in self.left_out.items())
            raise RecordError(
                f"no record of {self.records} compares responses: {reasons}",
                self.source,
                "name an export with annotations, or say --question or --responses",
            )
        return Converted(self.records, self.written, len(self.annotators), self.unknown_status, self.left_out)


def _field_in_export(field: str, layout: Layout, names: list[str]) -> str:
    """The export's name of a set's field: whoever corrects the export does not know the set."""
    if field.startswith("prompt"):
        return layout.prompt + field.removeprefix("prompt")
    number, _, rest = field.removeprefix("responses[").partition("]")
    if field.startswith("responses[") and number.isdecimal():
        return names[int(number)] + rest
    return field
