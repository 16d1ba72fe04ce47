"""An annotation tool's export, or a public data set's ratings and rankings, as a file of comparison sets."""

import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config.base import suggestion
from rlhf.data.imports import argilla, label_studio
from rlhf.data.imports.naming import Annotated, MalformedError
from rlhf.data.imports.public import PUBLIC_SETS, Place, Placed, PublicSet
from rlhf.data.imports.record_fields import Layout, Wanted, find_layout
from rlhf.data.readers import Row, read_source
from rlhf.data.records import ComparisonSet, Reason, parse_record, to_line
from rlhf.errors import RecordError, RequestError

NAMED_BAD_RECORDS = 20
"""Bad records that the error names: there is no quarantine file to look into."""

Records = Sequence[Mapping[str, Any]]


class Tool(NamedTuple):
    """How one annotation tool's records are read."""

    title: str
    recognises: Callable[[Mapping[str, Any]], bool]
    fields_of: Callable[[Records], Mapping[str, Any]]
    read: Callable[[Records, Layout, Wanted], Annotated]
    belongs: Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
    """Whether a record goes on about what the previous one began."""


TOOLS = {
    "argilla": Tool("Argilla", argilla.recognises, argilla.fields_of, argilla.read, lambda *_: False),
    "label-studio": Tool(
        "Label Studio", label_studio.recognises, label_studio.fields_of, label_studio.read, label_studio.belongs
    ),
}

ORIGINS = TOOLS | PUBLIC_SETS
"""Whatever comparison sets are made of, by its name on the command line."""


class Converted(NamedTuple):
    """What became of an export."""

    records: int
    sets: int
    annotators: int
    unknown_status: int
    """Answers taken although the export does not say whether they were submitted."""
    left_out: Counter[str]
    """How much was not written, by what it is."""
    rated: str = ""
    """The field of the ratings, where a data set has several."""


def convert_file(source: str, target: Path, tool: str | None, wanted: Wanted) -> Converted:
    """Write the comparison sets of an export, or nothing where one of its records is malformed.

    ``tool`` is one of ``ORIGINS``; None has the first readable record tell it.

    Raises:
        RequestError: the target is there already or cannot be; a wanted field or question is in no record.
        RecordError: a record is malformed, the tool is not recognised, or nothing compares responses.
        SettingsError, IndexUnreachableError: the source cannot be read at all.

    """
    if target.exists():
        raise RequestError("there is a file already, and it would be lost", str(target), "name another, or remove it")
    if not target.parent.is_dir():
        raise RequestError("there is no such folder", str(target.parent), f"mkdir -p {target.parent}")
    rows = read_source(source)
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


def refuse_exports(row: Row, source: str) -> None:
    """Refuse a row that records are made of only by converting its file.

    Raises:
        RecordError: an annotation tool or a public data set has such rows; the next step is the command to run.

    """
    # Pairs that are scored besides are read as they are.
    if not isinstance(row.value, Mapping) or {"chosen", "rejected"} <= row.value.keys():
        return
    for origin in ORIGINS.values():
        if origin.recognises(row.value):
            raise RecordError(
                f"the rows are those of {origin.title}, which are no records yet: comparison sets are made of them",
                row.place,
                f"rlhf data convert {shlex.quote(source)} comparisons.jsonl",
            )


class _Conversion:
    """One pass over an export, and what it came upon."""

    def __init__(self, source: str, tool: str | None, wanted: Wanted) -> None:
        self.source = source
        self.wanted = wanted
        self.tool: Tool | PublicSet | None = ORIGINS[tool] if tool else None
        self.fields: dict[str, Any] = {}
        self.layout: Layout | None = None
        self.records = 0
        self.written = 0
        self.unknown_status = 0
        self.annotators: set[str] = set()
        self.questions: set[str] = set()
        self.left_out = Counter[str]()
        self.bad: list[tuple[Place, Reason]] = []
        self.rated = ""

    def sets(self, rows: Iterable[Row]) -> Iterator[ComparisonSet]:
        """Every record's comparison set; the malformed are noted and the empty counted."""
        records = self._records(rows)
        if (first := next(records, None)) is None:
            return
        tool = self.tool or self._recognised(*first)
        records = chain([first], records)
        yield from self._public(tool, records) if isinstance(tool, PublicSet) else self._exported(tool, records)

    def _exported(self, tool: Tool, records: Iterable[Placed]) -> Iterator[ComparisonSet]:
        for place, together in self._joined(tool, records):
            try:
                annotated = tool.read(together, self._layout(tool.fields_of(together), place), self.wanted)
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

    def _public(self, public: PublicSet, records: Iterable[Placed]) -> Iterator[ComparisonSet]:
        if len(self.wanted.questions) > 1:
            raise RequestError(
                "ratings are taken of one field", "--question", f"name one: {', '.join(public.questions)}"
            )
        self.questions |= {*public.questions}
        self.rated = next(iter((*self.wanted.questions, *public.questions)), "")
        if public.questions and self.rated not in public.questions:
            raise RequestError(
                f"{public.title} has no ratings {self.rated!r}", "--question", suggestion(self.rated, public.questions)
            )
        for place, row in public.sets(self._of(public, records), self.rated, self.left_out):
            made = row.reason if isinstance(row, MalformedError) else parse_record(row, ComparisonSet)
            if isinstance(made, ComparisonSet):
                self.written += 1
                yield made
            else:
                self._note(place, made[0] if isinstance(made, list) else made)

    def _of(self, public: PublicSet, records: Iterable[Placed]) -> Iterator[Placed]:
        for place, record in records:
            if public.recognises(record):
                yield place, record
            else:
                self._note(place, Reason("", f"is no record of {public.title}; its fields are {', '.join(record)}"))

    def _records(self, rows: Iterable[Row]) -> Iterator[Placed]:
        """The readable records with their places."""
        for row in rows:
            self.records += 1
            # A whole JSON array may stand on one line, so that only the number finds the record.
            shown = f"{row.place}, record {self.records}" if row.counts_lines else row.place
            place = Place(self.records, shown)
            if row.problem or not isinstance(row.value, Mapping):
                problem = row.problem or f"a record must be an object with fields, not {type(row.value).__name__}"
                self._note(place, Reason("", problem))
            else:
                yield place, row.value

    def _joined(self, tool: Tool, records: Iterable[Placed]) -> Iterator[tuple[Place, list[Mapping[str, Any]]]]:
        """The records that belong together, at the place of the first."""
        place, together = Place(0, ""), list[Mapping[str, Any]]()
        for here, record in records:
            if together and tool.belongs(record, together[-1]):
                together.append(record)
                continue
            if together:
                yield place, together
            place, together = here, [record]
        if together:
            yield place, together

    def _note(self, place: Place, reason: Reason) -> None:
        self.bad.append((place, reason))

    def _recognised(self, place: Place, record: Mapping[str, Any]) -> Tool | PublicSet:
        found = next((origin for origin in ORIGINS.values() if origin.recognises(record)), None)
        if found is None:
            keys = ", ".join(map(str, record)) or "none"
            raise RecordError(
                f"no tool or data set that is known here writes such records; their fields are {keys}",
                place.shown,
                f"name an export, or say --from {' or '.join(ORIGINS)}; comparison sets need no converting",
            )
        return found

    def _layout(self, fields: Mapping[str, Any], place: Place) -> Layout:
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
                raise RecordError(error.reason.problem, place.shown, next_step) from None
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
            named = [f"{place.shown}: {reason}" for place, reason in sorted(self.bad)[:NAMED_BAD_RECORDS]]
            more = f"\n  and {len(self.bad) - NAMED_BAD_RECORDS} more" if len(self.bad) > NAMED_BAD_RECORDS else ""
            raise RecordError(
                f"{len(self.bad)} of {self.records} records are malformed, and nothing is written",
                "\n  ".join(named) + more,
                "correct them, in the tool that wrote them if there is one",
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
        return Converted(
            self.records, self.written, len(self.annotators), self.unknown_status, self.left_out, self.rated
        )


def _field_in_export(field: str, layout: Layout, names: list[str]) -> str:
    """The export's name of a set's field: whoever corrects the export does not know the set."""
    if field.startswith("prompt"):
        return layout.prompt + field.removeprefix("prompt")
    number, _, rest = field.removeprefix("responses[").partition("]")
    if field.startswith("responses[") and number.isdecimal():
        return names[int(number)] + rest
    return field
