"""Commands for records: check them, convert them, have people rank responses."""

import re
import sys
import tempfile
from pathlib import Path

from rlhf.cli.request import Request
from rlhf.config.nearest import suggestion
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
    found = validate_file(source, kind)
    print(f"{source}: {found.rows} rows of {found.kind}, all well")
    if found.forms:
        print(found.forms)


def _convert(request: Request, source: str, target: Path) -> None:
    from rlhf.data.imports.convert import ORIGINS, convert_file
    from rlhf.data.imports.layout import Wanted

    given = request.arguments
    if given.from_ is not None and given.from_ not in ORIGINS:
        raise RequestError(f"there is no tool or data set {given.from_!r}", "--from", suggestion(given.from_, ORIGINS))
    responses, questions, groups = (
        tuple(name.strip() for name in (listed or "").split(",") if name.strip())
        for listed in (given.responses, given.question, given.groups)
    )
    found = convert_file(source, target, given.from_, Wanted(given.prompt, responses, questions, groups))
    left_out = ", ".join(f"{count} {what}" for what, count in sorted(found.left_out.items())) or "nothing"
    status = f"; status unknown, taken as submitted: {found.unknown_status} responses" if found.unknown_status else ""
    by = f" by {found.annotators} annotators" if found.annotators else ""
    rated = f", rated by {found.rated}," if found.rated else ""
    print(
        f"{source}: {found.records} records read, {found.sets} comparison sets{by}{rated} written to {target}; "
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
    one = request.one(source)
    if one.stage.kind != "responses":
        raise RequestError(f"{source} makes {one.stage.kind}, and no responses to rank", "command line", "name collect")
    record = result_of(one)
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
                    print("whoever has that address can answer; it is not encrypted: stay in a network that you trust")
                print(f"answers are kept in {collection.journal.path}; Ctrl-C ends and writes {out}", flush=True)

            serve(collection, given.host, given.port, given.annotator, tell)
        exported = collection.export()
    counts = f"{exported.sets} ranked, rankings: {exported.rankings}, annotators: {exported.annotators}"
    print(f"wrote {out}; rows: {counts}")
    if exported.sets:
        print(f"next: set data.comparisons={out} in a pipeline; the same command goes on with what is left")
