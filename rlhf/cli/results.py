"""Commands about results: plan, show, compare, check, collect garbage, import, export."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rlhf.cli.run import Request, command_line, single_name
from rlhf.errors import RequestError, size
from rlhf.narration import diff_view, explain_view, lineage_view
from rlhf.pipeline import documents
from rlhf.pipeline.plan import instance_of, result_of
from rlhf.store import ActionRecord, Store
from rlhf.terminal import gc_table, leaderboard_table, plan_table, printable


def plan_(request: Request) -> None:
    """Show what would run, and why."""
    document = documents.plan_document(request.config, request.planned(request.names), request.store())
    if not request.answer(document):
        request.out.print(plan_table(document["stages"]))


def status(request: Request) -> None:
    """Show what is done, running and failed."""
    document = documents.status_document(request.config, request.planned(request.names), request.store())
    if request.answer(document):
        return
    request.out.print(plan_table(document["stages"], metrics=True))
    # Several copies of a file are one blob.
    usage = document["usage"]
    files, blobs, free = (size(usage[name]) for name in ("file_bytes", "blob_bytes", "free_bytes"))
    request.out.print(f"store: {usage['artifacts']} artifacts, {files} of files in {blobs} of blobs, {free} free")


def explain(request: Request) -> None:
    """Say why a stage is cached, or would run or did run again."""
    name = single_name(request, "STAGE")
    planned = request.planned([name])
    document = documents.explain_document(planned[name], planned, request.store())
    if not request.answer(document):
        request.out.print(explain_view(document), soft_wrap=True)


def lineage(request: Request) -> None:
    """Show everything that a result was made from, and its cost."""
    if len(request.names) > 1:
        raise RequestError("lineage takes one stage or artifact", "command line", "rlhf diff A B compares two")
    (record,) = _records(request, request.names or [None])
    document = documents.lineage_document(record, request.store())
    if not request.answer(document):
        request.out.print(lineage_view(document))


def _records(request: Request, targets: Sequence[str | None]) -> list[ActionRecord]:
    """Return the records that the targets name; None names the last committed stage."""
    # A target may also be a key, or a stage of another pipeline.
    planned = request.planned([name for name in request.names if name in request.config.instances])
    return [documents.find_record(target, planned, request.store()) for target in targets]


def diff(request: Request) -> None:
    """Compare two results: rlhf diff A B, each a stage, pipeline/stage, key or artifact."""
    if len(request.names) != 2:
        raise RequestError("diff takes two stages, keys or artifacts", "command line", "rlhf diff A B")
    old, new = _records(request, request.names)
    document = documents.diff_document(old, new, request.store())
    if not request.answer(document):
        request.out.print(diff_view(document))


def leaderboard(request: Request) -> None:
    """Rank the models that wrote the responses, by people's rankings: rlhf leaderboard [STAGE]."""
    if len(request.names) > 1:
        raise RequestError("leaderboard takes one stage", "command line", "rlhf leaderboard rank")
    planned = request.planned_stage(request.names[0] if request.names else "rank")
    record = result_of(planned)
    if all(file.path != "leaderboard.json" for file in request.store().manifest(record.artifact).files):
        raise RequestError(
            f"{planned.name} has no leaderboard: no training set names the models that wrote its responses",
            f"stage {planned.name}",
            'write "models": [name, …] beside the responses of the comparison sets, or have stage collect write them',
        )
    rows = json.loads(request.store().read_file(record.artifact, "leaderboard.json"))
    if not request.answer({"models": rows}):
        request.out.print(leaderboard_table(rows))


def _existing_store(request: Request) -> Store:
    """Return the pipeline's store; raise a RequestError where its folder is not there."""
    store = request.store()
    if store.bucket is None and not store.root.is_dir():
        raise RequestError("there is no store here", str(store.root), "correct store.uri; rlhf run makes a store")
    return store


def verify(request: Request) -> int:
    """Check every file of the store against its digest."""
    report = _existing_store(request).verify(repair=request.arguments.repair)
    damaged = [{"artifact": damage.artifact, "file": damage.file, "why": damage.why} for damage in report.damaged]
    status = 1 if damaged else 0
    if request.answer({"checked": report.checked, "damaged": damaged}):
        return status
    for damage in report.damaged:
        line = printable(f"{damage.artifact[:12]} {damage.file}: {damage.why}")
        request.out.print(line, highlight=False, markup=False)
    request.out.print(f"{report.checked} files checked, {len(damaged)} damaged")
    if damaged and not request.arguments.repair:
        request.out.print("next: rlhf verify --repair moves them to quarantine; rlhf run makes them again")
    return status


def gc(request: Request) -> None:
    """Remove results that no pipeline needs any more, and other old files."""
    hours = request.arguments.grace
    if request.names:
        raise RequestError("gc takes no stage: it collects the whole store", "command line", "rlhf gc --dry-run")
    if not 0 <= hours < math.inf:
        raise RequestError(f"--grace is {hours}, and must be a number from 0 on", "command line", "--grace 24")
    report = _existing_store(request).collect_garbage(hours * 3600, dry_run=request.arguments.dry_run)
    document = documents.gc_document(report, hours, dry_run=request.arguments.dry_run)
    if not request.answer(document):
        request.out.print(gc_table(document))


def import_(request: Request) -> None:
    """Make a model's folder the result of a stage."""
    from rlhf.pipeline.transfer import import_folder

    instance = request.arguments.as_
    stage = request.known[instance_of(request.config, instance, request.known).uses]
    store = request.store(create=True)
    if request.arguments.forget:
        ref = store.refs(request.config.name).get(instance)
        if ref is None or not ref.imported:
            raise RequestError(f"{instance} is not imported", f"stage {instance}", command_line(request, "status"))
        store.delete_ref(request.config.name, instance)
        request.out.print(f"{instance} is made by its stage again")
        return
    record = import_folder(Path(single_name(request, "DIR")), request.config, instance, stage, store)
    undo = command_line(request, "import", "--forget", "--as", instance)
    request.out.print(f"{instance} is artifact {record.artifact[:12]} until: {undo}", soft_wrap=True, markup=False)


def export(request: Request) -> None:
    """Write a model that a stage made to a folder, with its card: rlhf export STAGE DIR."""
    from rlhf.pipeline.transfer import export_artifact

    def card(folder: Path) -> str:
        from rlhf.report.card import model_card

        return model_card(planned, request.config.name, store, folder)

    if len(request.names) != 2:
        raise RequestError("export takes a stage and a folder", "command line", "rlhf export STAGE DIR")
    planned, target, store = request.planned_stage(request.names[0]), Path(request.names[1]), request.store()
    merge, gguf = request.arguments.merge, request.arguments.gguf
    export_artifact(planned, target, store, card, merge=merge, gguf=gguf)
    request.out.print(f"wrote {target}; its README.md says how to load, serve and publish it", soft_wrap=True)
