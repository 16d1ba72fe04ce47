"""Provenance of results, and the documents that ``--json`` prints of a plan, a stage or a result."""

import getpass
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf.attempt.folder import AttemptFolder, Progress
from rlhf.config.base import suggestion
from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import NextCommand, RequestError
from rlhf.pipeline.differences import Difference, differences, of_record
from rlhf.pipeline.plan import Planned, recipe, result_of
from rlhf.pipeline.reporting import Eta
from rlhf.pipeline.uploads import attempt_names, read_from_attempt, read_newest
from rlhf.store import ActionRecord, GarbageReport, Store

Document = dict[str, Any]
PACKAGES = ("rlhf-pipeline", "torch", "transformers", "trl", "peft", "deepspeed", "datasets", "ray")
LEAST_DIGITS = 6
"""The fewest digits that name a key or an artifact."""


def provenance() -> Document:
    """Return host, user, time, versions, and the commit of the code if it is a git checkout."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    versions: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).resolve().parent
        answer = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=5, check=True)
        commit = answer.stdout.strip()
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "user": user,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": commit,
        "versions": versions,
    }


def plan_document(config: PipelineConfig, stages: Mapping[str, Planned], store: Store) -> Document:
    """Return the pipeline, and for each stage what it would do and why."""
    return {
        "pipeline": config.name,
        "store": store.address,
        "stages": [_stage(planned) for planned in stages.values()],
    }


def status_document(config: PipelineConfig, stages: Mapping[str, Planned], store: Store) -> Document:
    """Return :func:`plan_document` with running and failed stages, and the usage of the store."""
    document = plan_document(config, stages, store)
    for number, planned in enumerate(stages.values()):
        state, why = stage_status(planned, store)
        progress = _progress(planned, store) if state == "running" else None
        document["stages"][number] |= {"state": state, "why": why, "progress": progress}
    return document | {"usage": asdict(store.usage())}


def _stage(planned: Planned) -> Document:
    record = planned.record
    return {
        "stage": planned.name,
        "state": planned.state,
        "key": planned.key,
        "artifact": record.artifact if record else None,
        "why": planned.why,
        "needs": list(planned.needs),
        "metrics": record.metrics if record else None,
        "seconds": record.seconds if record else None,
    }


def _progress(one: Planned, store: Store) -> Document | None:
    """Return a running stage's progress, and the seconds left at that moment; None before its first report."""
    assert one.key is not None
    text = read_newest(store, one.key, AttemptFolder.PROGRESS)
    if text is None:
        return None
    progress = Progress.parse(text)
    shown = {"message": progress.message, "done": progress.done, "total": progress.total}
    return shown | {"eta_seconds": Eta.of(progress).remaining(progress.at)}


def stage_status(one: Planned, store: Store) -> tuple[str, str]:
    """Return a stage's state and the reason: that of the plan, or running, or failed."""
    if one.key is None or one.record is not None:
        return one.state, one.why
    if (holder := store.holder(one.key)) is not None:
        return "running", f"held by {holder}"
    attempts = attempt_names(store, one.key)
    failure = read_from_attempt(store, one.key, attempts[-1], AttemptFolder.FAILURE) if attempts else None
    if failure is not None:
        error = AttemptFolder(Path()).error.parse(failure.decode())
        return "failed", f"{error.what} ({error.where})" if error.where else error.what
    return one.state, f"{one.why}; {len(attempts)} unfinished attempt(s)" if attempts else one.why


def explain_document(planned: Planned, stages: Mapping[str, Planned], store: Store) -> Document:
    """Return why a stage is cached or would run: what changed since its latest result, traced to the first cause.

    ``since`` is the key of that result. If the stage has a result, ``made`` holds what had changed when it was made; it
    is None for a first result, and when its predecessor's record is gone.
    """
    changed: list[Difference] = []
    # A lost import has no recipe: it came from outside.
    if planned.before is not None and (planned.needs or planned.state != "blocked"):
        changed = differences(of_record(planned.before, store, planned.name), recipe(planned, stages, store))
    previous = planned.record.provenance.get("previous") if planned.record else None
    predecessor = store.action(previous) if previous else None
    made = None
    if planned.record is not None and predecessor is not None:
        old, new = (of_record(record, store, planned.name) for record in (predecessor, planned.record))
        reasons = differences(old, new)
        made = {
            "since": predecessor.key,
            "changes": change_phrases(reasons, planned.name),
            "differences": [difference.to_json() for difference in reasons],
        }
    return _stage(planned) | {
        "changes": change_phrases(changed, planned.name),
        "settings": dict(planned.settings),
        "since": planned.before.key if planned.before else None,
        "differences": [difference.to_json() for difference in changed],
        "made": made,
    }


def change_phrases(changed: Sequence[Difference], stage: str) -> list[str]:
    """Return a phrase for each difference; that of a changed input ends with the differences behind it."""
    return [
        f"{difference.phrase}: {', '.join(difference.leaves(stage))}" if difference.within else difference.phrase
        for difference in changed
    ]


def lineage_document(record: ActionRecord, store: Store) -> Document:
    """Return everything that a result was made from."""
    inputs: Document = {}
    for role, entry in record.inputs.items():
        producer = store.action(entry["key"]) if entry["key"] else None
        # Without a producer, the input came from outside or its record is gone.
        unknown = {"stage": None, "key": entry["key"], "settings": {}, "inputs": {}, "provenance": {}}
        inputs[role] = lineage_document(producer, store) if producer else {"artifact": entry["artifact"]} | unknown
    return {
        "artifact": record.artifact,
        "stage": record.stage,
        "key": record.key,
        "settings": record.settings,
        "inputs": inputs,
        "provenance": record.provenance
        | {
            "seconds": record.seconds,
            "attempt": record.attempt,
            "read": {role: {"part": entry["part"], "digest": entry["digest"]} for role, entry in record.inputs.items()},
            "total": _total(ancestry(record, store)),
        },
    }


def ancestry(record: ActionRecord, store: Store) -> dict[str, ActionRecord]:
    """Return a record and those of all that it was made from, by key, those that others were made from first."""
    found: dict[str, ActionRecord] = {}

    def walk(one: ActionRecord) -> None:
        for entry in one.inputs.values():
            key = entry["key"]
            if key and key not in found and (producer := store.action(key)) is not None:
                walk(producer)
        found[one.key] = one

    walk(record)
    return found


def _total(records: Mapping[str, ActionRecord]) -> Document:
    """Return the total cost of results: seconds and GPU-hours of all attempts, failed ones included.

    The GPU-hours are null if any record lacks its GPUs.
    """
    seconds, gpu_seconds = 0.0, 0.0
    known = True
    for record in records.values():
        made: Document = {"seconds": record.seconds, "gpus": record.provenance.get("gpus")}
        for attempt in [made, *record.provenance.get("earlier_attempts", [])]:
            seconds += attempt["seconds"]
            gpu_seconds += attempt["seconds"] * (attempt["gpus"] or 0)
            known &= attempt["gpus"] is not None or not attempt["seconds"]
    gpu_hours = round(gpu_seconds / 3600, 4) if known else None
    return {"seconds": round(seconds, 3), "gpu_hours": gpu_hours, "results": len(records)}


def gc_document(report: GarbageReport, grace_hours: float, *, dry_run: bool) -> Document:
    """Return what garbage collection removed or would remove, and what stays."""
    return {
        "dry_run": dry_run,
        "grace_hours": grace_hours,
        "removed": {kind: asdict(heap) for kind, heap in report.removed.items()},
        "results": [_reference(record) for record in report.results],
        "kept": {
            "results": report.kept,
            "young": report.young,
            "blobs": asdict(report.kept_blobs),
            "pipelines": report.needed,
        },
    }


def diff_document(old: ActionRecord, new: ActionRecord, store: Store) -> Document:
    """Return the differences of two results: what they were made from, with what, and their metrics side by side."""
    changed = differences(of_record(old, store), of_record(new, store))
    # What enters no key, but may change a number beyond rounding where it should not.
    names = ("commit", "python", "platform", "ranks", "gpus", "devices")
    was, now = (
        {name: made.get(name) for name in names} | made.get("versions", {}) for made in (old.provenance, new.provenance)
    )
    metrics: Document = {}
    for name in {**old.metrics, **new.metrics}:
        a, b = old.metrics.get(name), new.metrics.get(name)
        metrics[name] = {"a": a, "b": b, "difference": None if a is None or b is None else b - a}
    return {
        "a": _reference(old),
        "b": _reference(new),
        "changes": change_phrases(changed, new.stage),
        "differences": [difference.to_json() for difference in changed],
        "circumstances": {
            name: {"a": was.get(name), "b": now.get(name)} for name in was | now if was.get(name) != now.get(name)
        },
        "metrics": metrics,
    }


def _reference(record: ActionRecord) -> Document:
    return {"stage": record.stage, "key": record.key, "artifact": record.artifact}


def find_record(target: str | None, stages: Mapping[str, Planned], store: Store) -> ActionRecord:
    """Return the record that a target names.

    target  a stage; ``pipeline/stage`` of any pipeline of the store; a key or an artifact's digest, or its first
            digits; None for the last committed stage

    Raises:
        RequestError: there is no such result, or more than one.
    """
    if target is None:
        committed = [planned.record for planned in stages.values() if planned.record is not None]
        if not committed:
            raise RequestError("no stage has a result yet", store.address, NextCommand("run"))
        return committed[-1]
    if target in stages:
        return result_of(stages[target])
    pipeline, slash, stage = target.partition("/")
    if not slash:
        return _record_by_digits(target, stages, store)
    ref = store.refs(pipeline).get(stage) if pipeline in store.pipelines() else None
    record = store.lookup(ref.key) if ref else None
    if record is None:
        known = [f"{name}/{instance}" for name in store.pipelines() for instance in store.refs(name)]
        raise RequestError(
            f"there is no result of {stage!r} in a pipeline {pipeline!r}",
            f"store {store.address}",
            suggestion(target, known) or "name a stage, a key or an artifact",
        )
    return record


def _record_by_digits(target: str, stages: Mapping[str, Planned], store: Store) -> ActionRecord:
    where = f"stages: {', '.join(stages)}; store: {store.address}"
    digits = target.lower().removesuffix("…")
    if not re.fullmatch(r"[0-9a-f]{1,64}", digits):
        raise RequestError(
            f"{target!r} names no stage or artifact", where, suggestion(target, stages) or NextCommand("status")
        )
    if len(digits) < LEAST_DIGITS:
        raise RequestError(
            f"{target!r} names no stage, and is too short for a key or an artifact",
            where,
            f"give at least {LEAST_DIGITS} of its digits",
        )
    records = [record for key in store.keys() if (record := store.action(key)) is not None]  # noqa: SIM118 - not a mapping
    # Keys first: an artifact may be the result of several keys.
    matching = [record for record in records if record.key.startswith(digits)]
    matching = matching or [record for record in records if record.artifact.startswith(digits)]
    if not matching:
        raise RequestError(f"{target!r} names no stage, key or artifact of this store", where, NextCommand("status"))
    if len({record.artifact for record in matching}) > 1:
        candidates = ", ".join(
            f"{record.stage} {record.key[:16]} (artifact {record.artifact[:16]})" for record in matching[:4]
        )
        raise RequestError(
            f"{target!r} names more than one result", f"{candidates}; store: {store.address}", "give more digits"
        )
    return matching[0]
