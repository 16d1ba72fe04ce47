"""Commands for records: check them, convert them, have people rank responses."""

import re
import sys
import tempfile
from pathlib import Path

from rlhf.cli.run import Request
from rlhf.config.base import suggestion
from rlhf.config.pipeline import (
    NAME_PATTERN,
)
from rlhf.errors import RequestError
from rlhf.pipeline.plan import result_of


def data(request: Request) -> None:
    """Check records, or make them of an export: rlhf data validate FILE, rlhf data convert FILE OUT.jsonl."""
    match request.names:
        case ["validate", source]:
            _validate(source, request.arguments.kind)
        case ["convert", source, target]:
            _convert(request, source, Path(target))
        case _:
            raise RequestError(
                "data takes the word validate and one file, or convert and two",
                "command line",
                "rlhf data validate FILE, or rlhf data convert FILE OUT.jsonl",
            )


def _validate(source: str, kind: str | None) -> None:
    from rlhf.data.validation import KINDS, validate_file

    if kind is not None and kind not in KINDS:
        raise RequestError(f"there is no kind of record {kind!r}", "--kind", suggestion(kind, KINDS))
    checked = validate_file(source, kind)
    print(f"{source}: {checked.rows} rows of {checked.kind}, all well")
    if checked.forms:
        print(checked.forms)


def _convert(request: Request, source: str, target: Path) -> None:
    from rlhf.data.imports.annotations import Wanted
    from rlhf.data.imports.convert import ORIGINS, convert_file

    given = request.arguments
    if given.from_ is not None and given.from_ not in ORIGINS:
        raise RequestError(f"there is no tool or data set {given.from_!r}", "--from", suggestion(given.from_, ORIGINS))
    responses, questions, groups = (
        tuple(name.strip() for name in (listed or "").split(",") if name.strip())
        for listed in (given.responses, given.question, given.groups)
    )
    converted = convert_file(source, target, given.from_, Wanted(given.prompt, responses, questions, groups))
    left_out = ", ".join(f"{count} {what}" for what, count in sorted(converted.left_out.items())) or "nothing"
    status = (
        f"; status unknown, taken as submitted: {converted.unknown_status} responses"
        if converted.unknown_status
        else ""
    )
    by = f" by {converted.annotators} annotators" if converted.annotators else ""
    rated = f", rated by {converted.rated}," if converted.rated else ""
    print(
        f"{source}: {converted.records} records read, {converted.sets} comparison sets{by}{rated} written to {target}; "
        f"left out: {left_out}{status}"
    )


def annotate(request: Request) -> None:
    """Have people rank responses on a local web page: rlhf annotate SETS.jsonl OUT.jsonl, or STAGE OUT.jsonl."""
    if len(request.names) != 2:
        raise RequestError(
            "annotate takes a file of responses, or a stage that collects them, and a file to write",
            "command line",
            "rlhf annotate SETS.jsonl OUT.jsonl",
        )
    source, out = request.names
    if not re.fullmatch(NAME_PATTERN, source) or Path(source).exists():
        _annotate(request, source, Path(out))
        return
    planned = request.planned_stage(source)
    if planned.stage.kind != "responses":
        raise RequestError(
            f"{source} makes {planned.stage.kind}, and no responses to rank", "command line", "name collect"
        )
    record = result_of(planned)
    with tempfile.TemporaryDirectory() as scratch:
        _annotate(request, str(request.store().checkout(record.artifact, Path(scratch) / source)), Path(out))


def _annotate(request: Request, source: str, out: Path) -> None:
    from rlhf.collect.collection import Collection

    given = request.arguments
    if not 0 <= given.port <= 65535:
        raise RequestError(f"there is no port {given.port}", "--port", "--port 8000")
    with Collection(source, out, create=not given.export_only) as collection:
        for notice in collection.notices:
            print(notice, file=sys.stderr)
        if not given.export_only:
            from rlhf.collect.server import serve

            def tell(address: str, for_others: bool) -> None:
                print(f"{len(collection.annotation.sets)} rows to rank; open {address}")
                if for_others:
                    print("anyone with that address can answer; it is not encrypted: stay in a network that you trust")
                print(f"answers are kept in {collection.journal.path}; Ctrl-C ends and writes {out}", flush=True)

            serve(collection, given.host, given.port, given.annotator, tell)
        exported = collection.export()
    counts = f"{exported.sets} ranked, rankings: {exported.rankings}, annotators: {exported.annotators}"
    print(f"wrote {out}; rows: {counts}")
    if exported.sets:
        print(f"next: set data.comparisons={out} in a pipeline; the same command goes on with what is left")
