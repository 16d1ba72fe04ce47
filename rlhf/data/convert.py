"""Convert an annotation tool's export, or a public data set's ratings and rankings, to a file of comparison sets."""

import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config.base import suggestion
from rlhf.data import argilla, label_studio
from rlhf.data.annotations import Annotated, Layout, Record, Wanted, find_layout
from rlhf.data.public import PUBLIC_SETS, Placed, PublicSet, RecordPlace
from rlhf.data.readers import Row, malformed, read_source
from rlhf.data.records import ComparisonSet, MalformedError, Reason, parse_record, to_line
from rlhf.errors import RecordError, RequestError


class Tool(NamedTuple):
    """How one annotation tool's records are read."""

    title: str
    recognises: Callable[[Record], bool]
    fields_of: Callable[[Sequence[Record]], Record]
    read: Callable[[Sequence[Record], Layout, Wanted], Annotated]
    """Raises MalformedError where an answer is not of its question's form, or names a response that is not there."""
    belongs: Callable[[Record, Record], bool]
    """Whether a record belongs to the same task as the previous one."""


ORIGINS: dict[str, Tool | PublicSet] = {
    "argilla": Tool("Argilla", argilla.recognises, argilla.fields_of, argilla.read, lambda *_: False),
    "label-studio": Tool(
        "Label Studio", label_studio.recognises, label_studio.fields_of, label_studio.read, label_studio.belongs
    ),
    **PUBLIC_SETS,
}
"""All sources of comparison sets, by their names on the command line."""


class Converted(NamedTuple):
    """The outcome of a conversion."""

    records: int
    sets: int
    annotators: int
    unknown_status: int
    """Answers taken although the export does not say whether they were submitted."""
    left_out: Counter[str]
    """The number of records and answers that were not written, by kind."""
    rated: str = ""
    """The field of the ratings, where a data set has several."""


def convert_file(source: str, target: Path, tool: str | None, wanted: Wanted) -> Converted:
    """Write the comparison sets of an export, or nothing where one of its records is malformed.

    ``tool`` is one of ``ORIGINS``; where it is None, the first readable record decides it.

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
    # The folder is beside the target, so that moving the file into place is one rename.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
        written = Path(folder) / target.name
        conversion = _Conversion(source, tool, wanted)
        with written.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(map(to_line, conversion.sets(rows)))
        converted = conversion.outcome()
        written.replace(target)
    return converted


def refuse_exports(row: Row, source: str) -> None:
    """Raise RecordError where a row's file must be converted first; its next step is the command to run."""
    # Pairs with scores are read as they are.
    if not isinstance(row.value, Mapping) or {"chosen", "rejected"} <= row.value.keys():
        return
    for origin in ORIGINS.values():
        if origin.recognises(row.value):
            raise RecordError(
                f"the rows are those of {origin.title}, which must be converted to comparison sets",
                row.place,
                f"rlhf data convert {shlex.quote(source)} comparisons.jsonl",
            )


class _Conversion:
    """One pass over an export, and the counts of its outcome."""

    def __init__(self, source: str, tool: str | None, wanted: Wanted) -> None:
        self.source = source
        self.wanted = wanted
        self.tool = ORIGINS[tool] if tool else None
        self.fields: dict[str, Any] = {}
        self.layout: Layout | None = None
        self.records = self.written = self.unknown_status = 0
        self.annotators, self.questions = set[str](), set[str]()
        self.left_out = Counter[str]()
        self.bad: list[tuple[RecordPlace, Reason]] = []
        self.rated = ""

    def sets(self, rows: Iterable[Row]) -> Iterator[ComparisonSet]:
        """Yield every record's comparison set; keep the reasons of malformed records and count the empty ones."""
        records = self._records(rows)
        if (first := next(records, None)) is None:
            return
        place, record = first
        tool = self.tool or next((origin for origin in ORIGINS.values() if origin.recognises(record)), None)
        if tool is None:
            keys = ", ".join(map(str, record)) or "none"
            raise RecordError(
                f"no known tool or data set writes such records; their fields are {keys}",
                place.shown,
                f"name an export, or say --from {' or '.join(ORIGINS)}; comparison sets need no converting",
            )
        records = chain([first], records)
        yield from self._public(tool, records) if isinstance(tool, PublicSet) else self._exported(tool, records)

    def _records(self, rows: Iterable[Row]) -> Iterator[Placed]:
        """Yield the readable records with their places."""
        for row in rows:
            self.records += 1
            # A whole JSON array may be on one line, so that only the number identifies the record.
            shown = f"{row.place}, record {self.records}" if row.counts_lines else row.place
            place = RecordPlace(self.records, shown)
            if row.problem or not isinstance(row.value, Mapping):
                problem = row.problem or f"a record must be an object with fields, not {type(row.value).__name__}"
                self.bad.append((place, Reason("", problem)))
            else:
                yield place, row.value

    def _public(self, public: PublicSet, records: Iterable[Placed]) -> Iterator[ComparisonSet]:
        if len(self.wanted.questions) > 1:
            next_step = f"name one: {', '.join(public.questions)}"
            raise RequestError("ratings are read from one field", "--question", next_step)
        self.questions |= {*public.questions}
        self.rated = next(iter((*self.wanted.questions, *public.questions)), "")
        if public.questions and self.rated not in public.questions:
            next_step = suggestion(self.rated, public.questions)
            raise RequestError(f"{public.title} has no ratings {self.rated!r}", "--question", next_step)

        def recognised() -> Iterator[Placed]:
            for place, record in records:
                if public.recognises(record):
                    yield place, record
                else:
                    problem = f"is no record of {public.title}; its fields are {', '.join(record)}"
                    self.bad.append((place, Reason("", problem)))

        for place, row in public.sets(recognised(), self.rated, self.left_out):
            made = [row.reason] if isinstance(row, MalformedError) else parse_record(row, ComparisonSet)
            if isinstance(made, list):
                self.bad.append((place, made[0]))
            else:
                self.written += 1
                yield made

    def _exported(self, tool: Tool, records: Iterable[Placed]) -> Iterator[ComparisonSet]:
        for place, task in self._tasks(tool, records):
            try:
                layout = self._layout(tool.fields_of(task), place)
                annotated = tool.read(task, layout, self.wanted)
                made = self._compared(annotated, layout)
            except MalformedError as error:
                self.bad.append((place, error.reason))
                continue
            self.questions |= annotated.questions
            self.left_out += annotated.left_out
            if made is not None:
                self.written += 1
                self.unknown_status += annotated.unknown_status
                self.annotators.update(made.annotators or ())
                yield made

    def _tasks(self, tool: Tool, records: Iterable[Placed]) -> Iterator[tuple[RecordPlace, list[Record]]]:
        """Yield the records of each task together, at the place of the first."""
        place, task = RecordPlace(0, ""), list[Record]()
        for here, record in records:
            if task and tool.belongs(record, task[-1]):
                task.append(record)
                continue
            if task:
                yield place, task
            place, task = here, [record]
        if task:
            yield place, task

    def _layout(self, fields: Record, place: RecordPlace) -> Layout:
        """Return the layout by the fields of all records so far, since a record may lack optional ones."""
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

    def _compared(self, annotated: Annotated, layout: Layout) -> ComparisonSet | None:
        """Return the set of a record; None where it has none, which is counted."""
        if len(annotated.responses) < 2:
            self.left_out["records with fewer than two responses"] += 1
            return None
        if not annotated.compares:
            self.left_out["records without a comparison"] += 1
            return None
        made = parse_record(annotated.as_row(), ComparisonSet)
        if not isinstance(made, list):
            return made
        # A message names the export's field, since a user who corrects the export does not know the set.
        field, problem = made[0]
        number, _, rest = field.removeprefix("responses[").partition("]")
        if field.startswith("prompt"):
            field = layout.prompt + field.removeprefix("prompt")
        elif field.startswith("responses[") and number.isdecimal():
            field = list(annotated.responses)[int(number)] + rest
        raise MalformedError(field, problem)

    def outcome(self) -> Converted:
        """Return the counts; refuse malformed records, wanted names in no record, and an export without comparisons."""
        for option, names in (("--prompt", filter(None, [self.wanted.prompt])), ("--responses", self.wanted.responses)):
            for name in names:
                if self.fields and name not in self.fields:
                    raise RequestError(f"there is no field {name!r}", option, suggestion(name, self.fields))
        if self.bad:
            bad = [f"{place.shown}: {reason}" for place, reason in sorted(self.bad)]
            next_step = "correct them, in the tool that wrote them if there is one"
            raise malformed(bad, self.records, ", and nothing is written", next_step, rows="records")
        if not self.records:
            raise RecordError("there are no records", self.source, "name a file that has some")
        for name in self.wanted.questions:
            if name not in self.questions:
                problem = f"no annotator answered {name!r}"
                raise RequestError(problem, "--question", suggestion(name, self.questions))
        if not self.written:
            reasons = "; ".join(f"{count} {kind}" for kind, count in self.left_out.items())
            raise RecordError(
                f"no record of {self.records} compares responses: {reasons}",
                self.source,
                "name an export with annotations, or say --question or --responses",
            )
        return Converted(
            self.records, self.written, len(self.annotators), self.unknown_status, self.left_out, self.rated
        )
