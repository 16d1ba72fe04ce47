"""Describe artifacts: provenance, and the documents that users read beside them."""

import getpass
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
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
from rlhf.pipeline.uploads import read_newest
from rlhf.store import ActionRecord, GarbageReport, Store

PACKAGES = ("rlhf-pipeline", "torch", "transformers", "trl", "peft", "deepspeed", "datasets", "ray")


def provenance() -> dict[str, Any]:
    """Host, user, time, versions, and the commit of the code where it is a git checkout."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "user": _user(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _commit(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


Document = dict[str, Any]
LEAST_DIGITS = 6
"""The fewest digits by which a key or an artifact may be named."""


def plan_document(config: PipelineConfig, planned: Mapping[str, Planned], store: Store) -> Document:
    """The pipeline, and of each stage what it would do and why."""
    return {
        "pipeline": config.name,
        "store": store.address,
        "stages": [_stage(one, one.state, one.why) for one in planned.values()],
    }


def status_document(config: PipelineConfig, planned: Mapping[str, Planned], store: Store) -> Document:
    """As :func:`plan_document`, with what is running and what failed, and how much the store holds."""
    return {
        "pipeline": config.name,
        "store": store.address,
        "stages": [_stage_status(one, store) for one in planned.values()],
        "usage": asdict(store.usage()),
    }


def _stage(one: Planned, state: str, why: str) -> Document:
    record = one.record
    return {
        "stage": one.name,
        "state": state,
        "key": one.key,
        "artifact": record.artifact if record else None,
        "why": why,
        "needs": list(one.needs),
        "metrics": record.metrics if record else None,
        "seconds": record.seconds if record else None,
    }


def _stage_status(one: Planned, store: Store) -> Document:
    state, why = _status(one, store)
    return _stage(one, state, why) | {"progress": _progress(one, store) if state == "running" else None}


def _progress(one: Planned, store: Store) -> Document | None:
    """How far a running stage is, and the seconds left when it said so; None before it first does.

    The seconds left are measured from the times in the file alone: the reader's clock need not agree with the rank's.
    """
    assert one.key is not None
    text = read_newest(store, one.key, AttemptFolder.PROGRESS)
    if text is None:
        return None
    progress = Progress.parse(text)
    eta = Eta()
    for at, done in progress.times:
        eta.observe(at, done, progress.total)
    shown = {"message": progress.message, "done": progress.done, "total": progress.total}
    return shown | {"eta_seconds": eta.remaining(progress.at)}


def _status(one: Planned, store: Store) -> tuple[str, str]:
    if one.key is None or one.record is not None:
        return one.state, one.why
    if (holder := store.holder(one.key)) is not None:
        return "running", f"held by {holder}"
    attempts = store.attempts(one.key)
    if attempts and (error := AttemptFolder(attempts[-1]).error.get()) is not None:
        return "failed", f"{error.what} ({error.where})" if error.where else error.what
    return one.state, f"{one.why}; {len(attempts)} unfinished attempt(s)" if attempts else one.why


def explain_document(one: Planned, planned: Mapping[str, Planned], store: Store) -> Document:
    """Why a stage is cached or would run: what changed since its latest result, followed to where it began.

    ``since`` is the key of that result. Of a stage whose result stands, ``made`` says the same of when it was made.
    """
    found: list[Difference] = []
    # A lost import has no recipe: it came from outside.
    if one.before is not None and (one.needs or one.state != "blocked"):
        found = differences(of_record(one.before, store, one.name), recipe(one, planned, store))
    return _stage(one, one.state, one.why) | {
        "changes": change_phrases(found, one.name),
        "settings": dict(one.settings),
        "since": one.before.key if one.before else None,
        "differences": [difference.to_json() for difference in found],
        "made": _made(one, store),
    }


def _made(one: Planned, store: Store) -> Document | None:
    """What had changed when a result was made, or None where none was before it, or nothing is known of that."""
    previous = one.record.provenance.get("previous") if one.record else None
    before = store.action(previous) if previous else None
    if one.record is None or before is None:
        return None
    found = differences(of_record(before, store, one.name), of_record(one.record, store, one.name))
    return {
        "since": before.key,
        "changes": change_phrases(found, one.name),
        "differences": [difference.to_json() for difference in found],
    }


def change_phrases(found: Sequence[Difference], stage: str) -> list[str]:
    """One phrase a difference; that of a changed input ends with the differences that it comes from."""
    return [f"{one.phrase}: {', '.join(one.leaves(stage))}" if one.within else one.phrase for one in found]


def lineage_document(record: ActionRecord, store: Store) -> Document:
    """Everything an artifact came from."""
    inputs: Document = {}
    for role, entry in record.inputs.items():
        producer = store.action(entry["key"]) if entry["key"] else None
        inputs[role] = lineage_document(producer, store) if producer else _unknown_origin(entry)
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
            "read": {role: {"part": one["part"], "digest": one["digest"]} for role, one in record.inputs.items()},
            "total": _total(_ancestry(record, store)),
        },
    }


def _ancestry(record: ActionRecord, store: Store) -> dict[str, ActionRecord]:
    """A record and those of all that it came from, by key: each counts once, however often it was read."""
    found = {record.key: record}
    for entry in record.inputs.values():
        key = entry["key"]
        if key and key not in found and (made := store.action(key)) is not None:
            found |= _ancestry(made, store)
    return found


def _total(records: Mapping[str, ActionRecord]) -> Document:
    """What results cost together: seconds and GPU-hours of all attempts, those that failed included.

    The GPU-hours are null where a result does not tell its GPUs.
    """
    seconds, gpu_seconds = 0.0, 0.0
    known = True
    for record in records.values():
        made: Document = {"seconds": record.seconds, "gpus": record.provenance.get("gpus")}
        for attempt in [made, *record.provenance.get("earlier_attempts", [])]:
            seconds += attempt["seconds"]
            gpu_seconds += attempt["seconds"] * (attempt["gpus"] or 0)
            known &= attempt["gpus"] is not None or not attempt["seconds"]
    return {
        "seconds": round(seconds, 3),
        "gpu_hours": round(gpu_seconds / 3600, 4) if known else None,
        "results": len(records),
    }


def _unknown_origin(entry: Mapping[str, str | None]) -> Document:
    """What is known of an input that came from outside, or whose record is gone."""
    artifact, key = entry["artifact"], entry["key"]
    return {"artifact": artifact, "stage": None, "key": key, "settings": {}, "inputs": {}, "provenance": {}}


def gc_document(report: GarbageReport, grace_hours: float, *, dry_run: bool) -> Document:
    """What garbage collection removed or would remove, and what stays."""
    return {
        "dry_run": dry_run,
        "grace_hours": grace_hours,
        "removed": {kind: asdict(heap) for kind, heap in report.removed.items()},
        "results": [{"stage": one.stage, "key": one.key, "artifact": one.artifact} for one in report.results],
        "kept": {
            "results": report.kept,
            "young": report.young,
            "blobs": asdict(report.kept_blobs),
            "pipelines": report.needed,
        },
    }


def diff_document(old: ActionRecord, new: ActionRecord, store: Store) -> Document:
    """What differs between two results: what they were made from, with what, and their metrics side by side."""
    found = differences(of_record(old, store), of_record(new, store))
    was, now = _circumstances(old), _circumstances(new)
    return {
        "a": _side(old),
        "b": _side(new),
        "changes": change_phrases(found, new.stage),
        "differences": [difference.to_json() for difference in found],
        "circumstances": {
            name: {"a": was.get(name), "b": now.get(name)} for name in was | now if was.get(name) != now.get(name)
        },
        "metrics": {
            name: _metric(old.metrics.get(name), new.metrics.get(name)) for name in {**old.metrics, **new.metrics}
        },
    }


def _side(record: ActionRecord) -> Document:
    return {"stage": record.stage, "key": record.key, "artifact": record.artifact}


def _circumstances(record: ActionRecord) -> Document:
    """What enters no key, and may yet move a number beyond rounding where it should not."""
    made = record.provenance
    names = ("commit", "python", "platform", "ranks", "gpus", "devices")
    return {name: made.get(name) for name in names} | made.get("versions", {})


def _metric(old: float | None, new: float | None) -> Document:
    return {"a": old, "b": new, "difference": None if old is None or new is None else new - old}


def find_record(target: str | None, planned: Mapping[str, Planned], store: Store) -> ActionRecord:
    """The record that is meant.

    target  a stage; ``pipeline/stage`` of any pipeline of the store; a key or an artifact's digest, or its first
            digits; None for the last committed stage

    Raises:
        RequestError: there is no such result, or more than one.
    """
    if target is None:
        committed = [one.record for one in planned.values() if one.record is not None]
        if not committed:
            raise RequestError("no stage has a result yet", store.address, NextCommand("run"))
        return committed[-1]
    if target in planned:
        return result_of(planned[target])
    pipeline, slash, stage = target.partition("/")
    if slash:
        return _result_elsewhere(pipeline, stage, store)
    return _result_by_digits(target, planned, store)


def _result_elsewhere(pipeline: str, stage: str, store: Store) -> ActionRecord:
    """The latest result of a stage of any pipeline of the store."""
    ref = store.refs(pipeline).get(stage) if pipeline in store.pipelines() else None
    record = store.lookup(ref.key) if ref else None
    if record is None:
        known = [f"{name}/{one}" for name in store.pipelines() for one in store.refs(name)]
        raise RequestError(
            f"there is no result of {stage!r} in a pipeline {pipeline!r}",
            f"store {store.address}",
            suggestion(f"{pipeline}/{stage}", known) or "name a stage, a key or an artifact",
        )
    return record


def _result_by_digits(target: str, planned: Mapping[str, Planned], store: Store) -> ActionRecord:
    where = f"stages: {', '.join(planned)}; store: {store.address}"
    digits = target.lower().removesuffix("…")
    if not re.fullmatch(r"[0-9a-f]{1,64}", digits):
        raise RequestError(
            f"{target!r} names no stage or artifact", where, suggestion(target, planned) or NextCommand("status")
        )
    if len(digits) < LEAST_DIGITS:
        raise RequestError(
            f"{target!r} names no stage, and is too short for a key or an artifact",
            where,
            f"give at least {LEAST_DIGITS} of its digits",
        )
    records = [record for key in store.keys() if (record := store.action(key)) is not None]  # noqa: SIM118 - not a mapping
    found = [one for one in records if one.key.startswith(digits)]
    # A key says more than an artifact, which may be the result of several.
    found = found or [one for one in records if one.artifact.startswith(digits)]
    if not found:
        raise RequestError(f"{target!r} names no stage, key or artifact of this store", where, NextCommand("status"))
    if len({one.artifact for one in found}) > 1:
        candidates = ", ".join(f"{one.stage} {one.key[:16]} (artifact {one.artifact[:16]})" for one in found[:4])
        raise RequestError(
            f"{target!r} names more than one result", f"{candidates}; store: {store.address}", "give more digits"
        )
    return found[0]
