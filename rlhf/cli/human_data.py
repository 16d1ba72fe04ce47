"""Commands for records: check them, convert them, let people rank responses."""

import re
import sys
import tempfile
from pathlib import Path

from rlhf.cli.run import Request
from rlhf.config.base import suggestion
from rlhf.config.pipeline import NAME_PATTERN
from rlhf.errors import RequestError
from rlhf.pipeline.plan import result_of


def data(request: Request) -> None:
    """Check records, or convert an export to records: rlhf data validate FILE, rlhf data convert FILE OUT.jsonl."""
    from rlhf.data.validation import KINDS, kinds_in, validate_file

    match request.names, request.arguments.kind:
        case ["validate", _], kind if kind is not None and kind not in KINDS:
            raise RequestError(f"there is no kind of record {kind!r}", "--kind", suggestion(kind, KINDS))
        case ["validate", source], kind:
            for part, named in ({source: kind} if kind else kinds_in(source)).items():
                checked = validate_file(part, named)
                print(f"{part}: {checked.rows} rows of {checked.kind}, all valid")
                if checked.forms:
                    print(checked.forms)
        case ["convert", source, target], _:
            _convert(request, source, Path(target))
        case _:
            raise RequestError(
                "data takes the word validate and one file, or convert and two",
                "command line",
                "rlhf data validate FILE, or rlhf data convert FILE OUT.jsonl",
            )


def _convert(request: Request, source: str, target: Path) -> None:
    from rlhf.data.annotations import Wanted
    from rlhf.data.convert import ORIGINS, convert_file

    options = request.arguments
    if options.from_ is not None and options.from_ not in ORIGINS:
        raise RequestError(
            f"there is no tool or data set {options.from_!r}", "--from", suggestion(options.from_, ORIGINS)
        )
    responses, questions, groups = (
        tuple(name.strip() for name in (names or "").split(",") if name.strip())
        for names in (options.responses, options.question, options.groups)
    )
    converted = convert_file(source, target, options.from_, Wanted(options.prompt, responses, questions, groups))
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(converted.left_out.items())) or "nothing"
    unknown = converted.unknown_status
    status = f"; status unknown, taken as submitted: {unknown} responses" if unknown else ""
    by = f" by {converted.annotators} annotators" if converted.annotators else ""
    rated = f", rated by {converted.rated}," if converted.rated else ""
    print(
        f"{source}: {converted.records} records read, {converted.sets} comparison sets{by}{rated} written to {target}; "
        f"left out: {left_out}{status}"
    )


def annotate(request: Request) -> None:
    """Let people rank responses on a local web page: rlhf annotate SETS.jsonl OUT.jsonl, or STAGE OUT.jsonl."""
    from rlhf.collect.collection import Collection

    if len(request.names) != 2:
        raise RequestError(
            "annotate takes a file of responses, or a stage that collects them, and a file to write",
            "command line",
            "rlhf annotate SETS.jsonl OUT.jsonl",
        )
    (source, out), options = request.names, request.arguments
    if not 0 <= options.port <= 65535:
        raise RequestError(f"there is no port {options.port}", "--port", "--port 8000")
    with tempfile.TemporaryDirectory() as scratch:
        if re.fullmatch(NAME_PATTERN, source) and not Path(source).exists():
            planned = request.planned_stage(source)
            if planned.stage.kind != "responses":
                raise RequestError(
                    f"{source} makes {planned.stage.kind}, and no responses to rank", "command line", "name collect"
                )
            source = str(request.store().checkout(result_of(planned).artifact, Path(scratch) / source))
        with Collection(source, Path(out), create=not options.export_only) as collection:
            for notice in collection.notices:
                print(notice, file=sys.stderr)
            if not options.export_only:
                from rlhf.collect.server import serve

                def tell(address: str, for_others: bool) -> None:
                    print(f"{len(collection.annotation.sets)} rows to rank; open {address}")
                    if for_others:
                        print("anyone with that address can answer; it is not encrypted: use a trusted network")
                    print(f"answers are kept in {collection.journal.path}; Ctrl-C ends and writes {out}", flush=True)

                serve(collection, options.host, options.port, options.annotator, tell)
            exported = collection.export()
    counts = f"{exported.sets} ranked, rankings: {exported.rankings}, annotators: {exported.annotators}"
    print(f"wrote {out}; rows: {counts}")
    if exported.sets:
        print(f"next: set data.comparisons={out} in a pipeline; the same command continues with the remaining rows")
