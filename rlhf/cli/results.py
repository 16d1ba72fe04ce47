"""Commands that look at a pipeline's results and at the store."""

import json
import math

from rlhf.cli.request import Request, single_name
from rlhf.errors import RequestError
from rlhf.narration import diff_view, explain_view, lineage_view
from rlhf.pipeline import documents
from rlhf.pipeline.plan import result_of
from rlhf.terminal import (
    gc_table,
    leaderboard_table,
    plan_table,
    printable,
    usage_line,
)


def plan_(request: Request) -> None:
    """Show what would run, and why."""
    document = documents.plan_document(request.config, request.planned(request.names), request.store())
    request.answer(document, lambda: request.out.print(plan_table(document["stages"])))


def status(request: Request) -> None:
    """Show what is done, running and failed."""
    document = documents.status_document(request.config, request.planned(request.names), request.store())

    def show() -> None:
        request.out.print(plan_table(document["stages"], metrics=True))
        request.out.print(usage_line(document["usage"]))

    request.answer(document, show)


def explain(request: Request) -> None:
    """Say why a stage is cached or would run again, or did."""
    name = single_name(request, "STAGE")
    planned = request.planned([name])
    document = documents.explain_document(planned[name], planned, request.store())

    def show() -> None:
        request.out.print(explain_view(document), soft_wrap=True)

    request.answer(document, show)


def lineage(request: Request) -> None:
    """Show everything a result came from, and what it cost."""
    if len(request.names) > 1:
        raise RequestError("lineage takes one stage or artifact", "command line", "rlhf diff A B compares two")
    target = request.names[0] if request.names else None
    record = documents.find_record(target, request.planned(_stages_among(request)), request.store())
    document = documents.lineage_document(record, request.store())
    request.answer(document, lambda: request.out.print(lineage_view(document)))


def _stages_among(request: Request) -> list[str]:
    """The names of the command line that are stages of the pipeline, and not keys or another pipeline's stages."""
    return [name for name in request.names if name in request.config.instances]


def diff(request: Request) -> None:
    """Compare two results: rlhf diff A B, each a stage, pipeline/stage, key or artifact."""
    if len(request.names) != 2:
        raise RequestError("diff takes two stages, keys or artifacts", "command line", "rlhf diff A B")
    planned, store = request.planned(_stages_among(request)), request.store()
    old, new = (documents.find_record(name, planned, store) for name in request.names)
    document = documents.diff_document(old, new, store)
    request.answer(document, lambda: request.out.print(diff_view(document)))


def leaderboard(request: Request) -> None:
    """Rank the models that wrote the responses, by what people said: rlhf leaderboard [STAGE]."""
    if len(request.names) > 1:
        raise RequestError("leaderboard takes one stage", "command line", "rlhf leaderboard rank")
    planned = request.planned_stage(request.names[0] if request.names else "rank")
    record = result_of(planned)
    held = {file.path for file in request.store().manifest(record.artifact).files}
    if "leaderboard.json" not in held:
        raise RequestError(
            f"{planned.name} has no leaderboard: no training set names the models that wrote its responses",
            f"stage {planned.name}",
            'write "models": [name, …] beside the responses of the comparison sets, or have stage collect write them',
        )
    rows = json.loads(request.store().read_file(record.artifact, "leaderboard.json"))
    request.answer({"models": rows}, lambda: request.out.print(leaderboard_table(rows)))


def verify(request: Request) -> int:
    """Check every file of the store against its digest."""
    report = request.store().verify(repair=request.arguments.repair)
    damaged = [{"artifact": damage.artifact, "file": damage.file, "why": damage.why} for damage in report.damaged]

    def show() -> None:
        for damage in report.damaged:
            line = printable(f"{damage.artifact[:12]} {damage.file}: {damage.why}")
            request.out.print(line, highlight=False, markup=False)
        request.out.print(f"{report.checked} files checked, {len(damaged)} damaged")
        if damaged and not request.arguments.repair:
            request.out.print("next: rlhf verify --repair moves them to quarantine; rlhf run makes them again")

    request.answer({"checked": report.checked, "damaged": damaged}, show)
    return 1 if damaged else 0


def gc(request: Request) -> None:
    """Remove results that no pipeline needs any more, and other old leftovers."""
    hours = request.arguments.grace
    if request.names:
        raise RequestError("gc takes no stage: it collects the whole store", "command line", "rlhf gc --dry-run")
    if not 0 <= hours < math.inf:
        raise RequestError(f"--grace is {hours}, and must be a number from 0 on", "command line", "--grace 24")
    dry_run: bool = request.arguments.dry_run
    report = request.store().collect_garbage(hours * 3600, dry_run=dry_run)
    document = documents.gc_document(report, hours, dry_run=dry_run)
    request.answer(document, lambda: request.out.print(gc_table(document)))
