"""The report of a pipeline as one HTML file that needs no network.

Texts from outside are escaped by the template, and in the page's JSON nothing can end its script. A content security
policy allows the page's own three scripts alone.
"""

import base64
import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment

from rlhf.config.pipeline import PipelineConfig
from rlhf.errors import NextCommand, RequestError, RlhfError, is_no_room
from rlhf.history.diagnosis import Figures, Symptom, in_words, symptoms
from rlhf.history.reading import (
    Row,
    StageHistory,
    earlier_results,
    evaluated_samples,
    pipeline_history,
    prompt_text,
)
from rlhf.pipeline.documents import diff_document, lineage_document
from rlhf.pipeline.plan import Planned
from rlhf.report.graph import graph
from rlhf.report.sections import QUALITY, result_file, sections
from rlhf.store import Store
from rlhf.terminal import duration

LONGEST = 2000
"""Characters of a text that the page shows."""
MOST_SAMPLES = 4000
"""Responses that a page holds, those of the last iterations."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that no text shows; among them those that turn the direction of what follows."""


MARK = b'<meta name="generator" content="rlhf report">'
"""Stands in the page, by which a file is known as a report that may be replaced."""


def write_report(config: PipelineConfig, stages: Mapping[str, Planned], store: Store, path: Path) -> None:
    """Write the report of the stages of a plan.

    Raises:
        RequestError: no stage has a result or an attempt yet, or the file cannot be written, or holds something else.
    """
    histories = pipeline_history(stages, store)
    if not any(history.record or history.attempts for history in histories.values()):
        raise RequestError("nothing has run yet", f"pipeline {config.name}, store {store.address}", NextCommand("run"))
    shown, reports = content(config, histories, store), folder_of(store)
    try:
        if path.is_file() and path.parent.absolute() != reports.absolute() and MARK not in path.read_bytes()[:1024]:
            raise RequestError(f"{path} is there already, and is no report", str(path), "name another file by --out")
        for folder in (path.parent, reports):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(rendered(shown, vega(reports)), encoding="utf-8")
    except OSError as error:
        if is_no_room(error):
            error.filename = error.filename or str(path)  # a write, unlike an opening, does not name its file
            raise
        raise RequestError(f"the report cannot be written: {error}", str(path), "name another file by --out") from error


def folder_of(store: Store) -> Path:
    """Return where reports are written unless a file is named: in the store's folder, or a bucket's local one."""
    return store.root / "reports"


def content(config: PipelineConfig, histories: Mapping[str, StageHistory], store: Store) -> dict[str, Any]:
    """Return what the page shows."""
    figures = _figures(histories, store)
    found = symptoms(figures)
    return {
        "pipeline": config.name,
        "store": store.address,
        "words": in_words(figures, found),
        "method": figures.method,
        "symptoms": found,
        "graph": graph(histories, store),
        "sections": [section for history in histories.values() for section in sections(history, store)],
        "changes": [change for history in histories.values() for change in _changes(history, store)],
        "lineage": _lineage(histories, store),
        "samples": _samples(histories, store),
        "damaged": sum(history.damaged for history in histories.values()),
    }


LAST = ("ppo", "grpo", "rloo", "dpo")
"""Stages that tune a policy; the first of them that has measured something is judged."""


def _of_stage(histories: Mapping[str, StageHistory], stage: str) -> StageHistory | None:
    """Return the last instance of a stage that has measured something."""
    instances = [history for history in histories.values() if history.planned.stage.name == stage]
    return next((history for history in reversed(instances) if history.record or history.metrics), None)


def _tuned(histories: Mapping[str, StageHistory]) -> StageHistory | None:
    """Return the stage that is judged, preferably one that evaluate compares."""
    evaluate = _of_stage(histories, "evaluate")
    compared = evaluate.planned.settings["policies"] if evaluate else ()
    known = {stage: history for stage in LAST if (history := _of_stage(histories, stage))}
    return min(known.values(), key=lambda history: history.name not in compared, default=None)


def _figures(histories: Mapping[str, StageHistory], store: Store) -> Figures:
    of = {stage: _of_stage(histories, stage) for stage in ("sft", "rm", "evaluate")}
    finals = {stage: history.record.metrics if history and history.record else {} for stage, history in of.items()}
    sft, rm, tuned = of["sft"], of["rm"], _tuned(histories)
    figures = Figures(
        sft=sft.metrics if sft else (),
        rm=finals["rm"],
        evaluate=finals["evaluate"],
        quality=(result_file(rm.record, QUALITY, store) if rm else None) or {},
    )
    if tuned is None:
        return figures
    method = tuned.planned.stage.name
    return replace(
        figures,
        iterations=() if method == "dpo" else tuned.metrics,
        samples=tuned.samples,
        settings=tuned.planned.settings,
        method=method.upper(),
        instance=tuned.name,
    )


def _changes(history: StageHistory, store: Store) -> list[dict[str, Any]]:
    """Return how a stage's result differs from that of its previous run: what it was made from, and its figures."""
    record = history.record
    if record is None or not (earlier := earlier_results(history.planned, store)):
        return []
    previous = record.provenance.get("previous")
    before = next((one for one in earlier if one.key == previous), earlier[-1])
    document = diff_document(before, record, store)
    figures = [
        [name, _figure(both["a"]), _figure(both["b"]), _figure(both["difference"], "+")]
        for name, both in document["metrics"].items()
    ]
    around = [f"{name} {both['a']} → {both['b']}" for name, both in document["circumstances"].items()]
    changed = [*document["changes"], *around]
    return (
        [{"stage": history.name, "before": before.key[:12], "changes": changed, "figures": figures}] if changed else []
    )


def _figure(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4g}"


def _lineage(histories: Mapping[str, StageHistory], store: Store) -> dict[str, Any]:
    """Return what the last result was made from, each result once, with versions, hosts and cost."""
    records = [history.record for history in histories.values() if history.record]
    if not records:
        return {}
    document = lineage_document(records[-1], store)
    rows: dict[str, list[str]] = {}

    def walk(one: Mapping[str, Any]) -> None:
        for parent in one["inputs"].values():
            walk(parent)
        rows[one["artifact"]] = _lineage_row(one)

    walk(document)
    made = document["provenance"]
    total = made["total"]
    gpu_hours = "an unknown number of" if total["gpu_hours"] is None else total["gpu_hours"]
    cost = f"{duration(total['seconds'])} of work, {gpu_hours} GPU-hours, {total['results']} results"
    versions = {"Python": made.get("python"), "code": made.get("commit"), **made.get("versions", {})}
    return {"rows": list(rows.values()), "cost": cost, "versions": versions}


LINEAGE = ("stage", "key", "artifact", "made from", "finished", "host", "time", "GPU-hours")


def _lineage_row(one: Mapping[str, Any]) -> list[str]:
    """Return a result's row of LINEAGE; its inputs are named by the digests that it read."""
    made = one["provenance"]
    read = [
        f"{role} {entry['digest'][:12]}" + (f" ({entry['part']})" if entry["part"] else "")
        for role, entry in made.get("read", {}).items()
    ]
    gpus, seconds = made.get("gpus"), made.get("seconds")
    return [
        one["stage"] or "from outside",
        (one["key"] or "")[:12],
        one["artifact"][:12],
        ", ".join(read),
        str(made.get("finished") or ""),
        ", ".join([*(made.get("hosts") or [made.get("host") or ""]), *(made.get("devices") or [])]),
        "" if seconds is None else duration(seconds),
        "" if gpus is None or seconds is None else f"{gpus * seconds / 3600:.3g}",
    ]


def _samples(histories: Mapping[str, StageHistory], store: Store) -> list[dict[str, Any]]:
    """Return responses through the iterations, and those before and after, with texts cut to their beginnings."""
    rows: list[dict[str, Any]] = []
    for history in histories.values():
        kept = [row | {"stage": history.name} for row in history.samples[-MOST_SAMPLES:]]
        for row in kept or _evaluated(history, store):
            shown = {
                name: row[name]
                for name in ("stage", "step", "score", "ended", "watched", "finished", "score_before")
                if name in row
            }
            shown |= {"prompt": shown_text(prompt_text(row["prompt"])), "response": shown_text(str(row["response"]))}
            if "before" in row:
                shown["before"] = shown_text(str(row["before"]))
            if "tokens" in row and len(str(row["response"])) <= LONGEST:
                shown["tokens"] = row["tokens"]
            rows.append(shown)
    return rows[-MOST_SAMPLES:]


def _evaluated(history: StageHistory, store: Store) -> list[Row]:
    try:
        return [row | {"stage": history.name} for row in evaluated_samples(history.record, store).rows]
    except (OSError, RlhfError):  # the artifact was collected or damaged
        return []


def shown_text(text: str) -> str:
    """Return the beginning of a text, with control characters replaced."""
    kept = text[:LONGEST] + ("…" if len(text) > LONGEST else "")
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", kept)


def rendered(shown: Mapping[str, Any], script: str) -> str:
    """Return the page.

    script  of :func:`vega`
    """
    here = files("rlhf.report")
    shown = _safe(shown)
    specs = [part["spec"] for section in shown["sections"] for part in section["parts"] if "spec" in part]
    paths = shown["graph"]["paths"]
    values = {"specs": specs, "samples": shown["samples"], "paths": paths}
    data = json.dumps(values, separators=(",", ":"), default=str)
    scripts = [script, *((here / name).read_text(encoding="utf-8") for name in ("page.js", "graph.js"))]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    return template.render(
        **shown,
        style=(here / "page.css").read_text(encoding="utf-8"),
        # In JSON "<" stands in strings alone.
        data=data.replace("<", "\\u003c"),
        scripts=scripts,
        hashes=" ".join(map(_allowed, scripts)),
        state=_state_in_words,
        lineage_header=LINEAGE,
    )


def vega(cache: Path) -> str:
    """Return Vega's script, from the cache where an earlier report has left it: making it takes a second or two."""
    kept = cache / f"vega-{version('vl-convert-python')}.js"
    if not kept.exists():
        bundle: Any = vl_convert.javascript_bundle  # its types ask for a snippet that it does not need
        temporary = kept.with_suffix(f".{secrets.token_hex(4)}.tmp")
        temporary.write_text(bundle(), encoding="utf-8")
        temporary.replace(kept)
    return kept.read_text(encoding="utf-8")


def _safe(value: Any) -> Any:
    """Return a value with control characters of its texts replaced, and numbers that JSON lacks as null."""
    if isinstance(value, str):
        return CONTROL.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {name: _safe(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_safe(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _allowed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _state_in_words(symptom: Symptom) -> str:
    return {True: "yes", False: "no", None: "not known"}[symptom.holds]
