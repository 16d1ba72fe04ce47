"""What ``plan``, ``status``, ``explain`` and ``lineage`` answer, as JSON values (their shapes are a contract)."""

import json
from collections.abc import Mapping
from typing import Any

from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import RequestError
from rlhf.pipeline.context import FAILURE
from rlhf.pipeline.plan import Planned, changes
from rlhf.store import ActionRecord, Store

Document = dict[str, Any]


def plan_document(config: PipelineConfig, planned: Mapping[str, Planned], store: Store) -> Document:
    """The pipeline, and of each stage what it would do and why."""
    return {
        "pipeline": config.name,
        "store": store.address,
        "stages": [_stage(one, one.state, one.why) for one in planned.values()],
    }


def status_document(config: PipelineConfig, planned: Mapping[str, Planned], store: Store) -> Document:
    """As :func:`plan_document`, with what is running and what failed."""
    return {
        "pipeline": config.name,
        "store": store.address,
        "stages": [_stage(one, *_status(one, store)) for one in planned.values()],
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


def _status(one: Planned, store: Store) -> tuple[str, str]:
    if one.key is None or one.record is not None:
        return one.state, one.why
    if (holder := store.holder(one.key)) is not None:
        return "running", f"held by {holder}"
    attempts = store.attempts(one.key)
    if attempts and (attempts[-1] / FAILURE).exists():
        failure = json.loads((attempts[-1] / FAILURE).read_text(encoding="utf-8"))
        return "failed", f"{failure['what']} ({failure['where']})" if failure["where"] else failure["what"]
    return one.state, f"{one.why}; {len(attempts)} unfinished attempt(s)" if attempts else one.why


def explain_document(one: Planned, store: Store, pipeline: str) -> Document:
    """Why a stage is cached or would run: the fields that changed since its latest result, old and new."""
    ref = store.refs(pipeline).get(one.name)
    before = store.action(ref.key) if ref else None
    found: list[str] = []
    if ref is not None and before is not None and not ref.imported:
        # Of a blocked stage the settings are known, and not yet what its inputs will be.
        found = changes(before, one.stage, one.settings, before.inputs if one.needs else one.inputs)
    return _stage(one, one.state, one.why) | {"changes": found, "settings": dict(one.settings)}


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
        "provenance": record.provenance | {"seconds": record.seconds, "attempt": record.attempt},
    }


def _unknown_origin(entry: Mapping[str, str | None]) -> Document:
    """What is known of an input that came from outside, or whose record is gone."""
    artifact, key = entry["artifact"], entry["key"]
    return {"artifact": artifact, "stage": None, "key": key, "settings": {}, "inputs": {}, "provenance": {}}


def find_record(target: str | None, planned: Mapping[str, Planned], store: Store) -> ActionRecord:
    """The record of a stage, of a digest or key (or the first digits of one), or of the last committed stage.

    Raises:
        RequestError: there is no such result.
    """
    if target is None:
        committed = [one.record for one in planned.values() if one.record is not None]
        if not committed:
            raise RequestError("no stage has a result yet", store.address, "rlhf run")
        return committed[-1]
    if target in planned:
        record = planned[target].record
        if record is None:
            raise RequestError(f"{target} has no result yet", planned[target].why, f"rlhf run {target}")
        return record
    records = [record for key in store.keys() if (record := store.action(key)) is not None]  # noqa: SIM118 - not a mapping
    found = [
        one for one in records if len(target) >= 6 and (one.artifact.startswith(target) or one.key.startswith(target))
    ]
    if len({one.artifact for one in found}) != 1:
        raise RequestError(
            f"{target!r} names {'no' if not found else 'more than one'} stage or artifact",
            f"stages: {', '.join(planned)}; store: {store.address}",
            "rlhf status",
        )
    return found[0]
