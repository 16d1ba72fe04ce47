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
from collections.abc import Mapping, Sequence
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
    AttemptHistory,
    Row,
    StageHistory,
    attempts_at,
    earlier_results,
    evaluated_samples,
    joined,
    pipeline_history,
    prompt_text,
)
from rlhf.pipeline.documents import diff_document, lineage_document
from rlhf.pipeline.plan import Planned
from rlhf.report import charts
from rlhf.store import ActionRecord, Store
from rlhf.terminal import duration

LONGEST = 2000
"""Characters of a text that the page shows."""
MOST_SAMPLES = 4000
"""Responses that a page holds, those of the last iterations."""
EARLIER = 5
"""Earlier runs that are laid over."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that no text shows; among them those that turn the direction of what follows."""
QUALITY, LEADERBOARD = "quality.json", "leaderboard.json"
SFT_CURVES = {"loss": "loss", "mean_token_accuracy": "accuracy"}
RM_CURVES = {"loss": "loss", "accuracy": "accuracy"}
PPO_CURVES = {
    "objective/scores": "mean score",
    "objective/kl": "KL, nats",
    "length/mean": "mean length, tokens",
    "policy/entropy_avg": "entropy, nats a token",
}


def write_report(config: PipelineConfig, stages: Mapping[str, Planned], store: Store, path: Path) -> None:
    """Write the report of the stages of a plan.

    Raises:
        RequestError: no stage has a result or an attempt yet, or the file cannot be written.
    """
    histories = pipeline_history(stages, store)
    if not any(history.record or history.attempts for history in histories.values()):
        raise RequestError("nothing has run yet", f"pipeline {config.name}, store {store.address}", NextCommand("run"))
    shown, reports = content(config, histories, store), folder_of(store)
    try:
        for folder in (path.parent, reports):
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(rendered(shown, vega(reports)), encoding="utf-8")
    except OSError as error:
        if is_no_room(error):
            raise
        raise RequestError(f"the report cannot be written: {error}", str(path), "name another file by --out") from error


def folder_of(store: Store) -> Path:
    """Return where reports are written unless a file is named: in the store's folder, or a bucket's local one."""
    return store.root / "reports"


def content(config: PipelineConfig, histories: Mapping[str, StageHistory], store: Store) -> dict[str, Any]:
    """Return what the page shows."""
    figures = _figures(histories)
    found = symptoms(figures)
    return {
        "pipeline": config.name,
        "store": store.address,
        "words": in_words(figures, found),
        "symptoms": found,
        "columns": _columns(histories),
        "sections": [section for history in histories.values() for section in _sections(history, store)],
        "changes": [change for history in histories.values() for change in _changes(history, store)],
        "lineage": _lineage(histories, store),
        "samples": _samples(histories, store),
        "damaged": sum(history.damaged for history in histories.values()),
    }


def _of_stage(histories: Mapping[str, StageHistory], stage: str) -> StageHistory | None:
    """Return the last instance of a stage that has measured something."""
    instances = [history for history in histories.values() if history.planned.stage.name == stage]
    return next((history for history in reversed(instances) if history.record or history.metrics), None)


def _figures(histories: Mapping[str, StageHistory]) -> Figures:
    of = {stage: _of_stage(histories, stage) for stage in ("sft", "rm", "ppo", "evaluate")}
    rows = {stage: history.metrics if history else () for stage, history in of.items()}
    finals = {stage: history.record.metrics if history and history.record else {} for stage, history in of.items()}
    ppo = of["ppo"]
    settings = ppo.planned.settings if ppo else {}
    samples = ppo.samples if ppo else ()
    return Figures(rows["sft"], rows["ppo"], finals["rm"], finals["evaluate"], samples, settings)


def _columns(histories: Mapping[str, StageHistory]) -> list[list[dict[str, Any]]]:
    """Return the stages by their distance from the pipeline's sources, for its graph."""
    depth: dict[str, int] = {}
    columns: list[list[dict[str, Any]]] = []
    for name, history in histories.items():
        sources = sorted({wire.instance for wire in history.planned.wires.values() if wire.instance in histories})
        depth[name] = 1 + max((depth.get(source, 0) for source in sources), default=0)
        while len(columns) < depth[name]:
            columns.append([])
        record = history.record
        gpus = record.provenance.get("gpus") if record else None
        columns[depth[name] - 1].append(
            {
                "name": name,
                "state": history.state,
                "why": history.why,
                "sources": sources,
                "time": duration(record.seconds) if record else "",
                "gpu_hours": f"{gpus * record.seconds / 3600:.3g}" if record and gpus else "",
                "failed": str(history.attempts[-1].failure or "") if history.attempts and not record else "",
            }
        )
    return columns


def _sections(history: StageHistory, store: Store) -> list[dict[str, Any]]:
    """Return the charts and tables of a stage; none of a stage that has nothing to show."""
    make = {"sft": _sft, "rm": _rm, "rank": _rank, "ppo": _ppo, "evaluate": _evaluate}.get(history.planned.stage.name)
    parts = make(history, store) if make else []
    return [{"name": history.name, "parts": parts}] if parts else []


def _chart(title: str, text: str, spec: charts.Spec) -> dict[str, Any]:
    return {"title": title, "text": text, "spec": spec}


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    return {"title": title, "header": header, "rows": rows}


def _sft(history: StageHistory, store: Store) -> list[dict[str, Any]]:  # noqa: ARG001 - as the others
    if not history.metrics:
        return []
    final = history.record.metrics.get("eval/loss") if history.record else None
    held_out = "" if final is None else f" Held-out loss at the end: {final:.3f}."
    return [_chart("Loss", f"Of demonstrations, by step.{held_out}", charts.lines(history.metrics, "step", SFT_CURVES))]


def _rm(history: StageHistory, store: Store) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if history.metrics:
        parts.append(_chart("Training", "By step.", charts.lines(history.metrics, "step", RM_CURVES)))
    if (quality := _file(history.record, QUALITY, store)) is None:
        return parts
    shares = {"all pairs": quality["accuracy"], "pairs within a set": quality.get("accuracy_within")}
    people = {
        "all pairs": quality.get("beside_people", {}).get("all"),
        "pairs within a set": quality.get("beside_people", {}).get("within"),
    }
    rows = [
        [name, _share(share), f"{share['low']:.1%} to {share['high']:.1%}", _share(beside, "human")]
        for name, share in shares.items()
        if share
        for beside in [(people[name] or {}).get("ties_half")]
    ]
    header = ("held-out pairs", "reward model", "95 % interval", "a person")
    parts.append(_table("Accuracy beside people", header, rows))
    gaps = [
        {"gap": f"{bin_['gap_from']:.2g} to {bin_['gap_to']:.2g}", **bin_}
        for bin_ in quality.get("accuracy_by_gap", [])
    ]
    if gaps:
        spec = charts.bars(gaps, "gap", "share", "difference of strengths", "share ordered as people did")
        parts.append(_chart("Accuracy by gap", "Pairs far apart should be easy.", spec))
    bins = [{"said": f"{bin_['predicted']:.2f}", **bin_} for bin_ in quality.get("calibration", {}).get("bins", [])]
    if bins:
        spec = charts.bars(bins, "said", "observed", "predicted probability", "observed share")
        parts.append(_chart("Calibration", "Bars should be as high as their label says.", spec))
    return parts


def _share(value: Mapping[str, float] | None, name: str = "share") -> str:
    return "" if value is None else f"{value[name]:.1%}"


def _rank(history: StageHistory, store: Store) -> list[dict[str, Any]]:
    if (models := _file(history.record, LEADERBOARD, store)) is None:
        return []
    rows = [
        [row["model"], f"{row['elo']:+.0f}", "" if row["low"] is None else f"{row['low']:+.0f} to {row['high']:+.0f}"]
        for row in models
    ]
    return [_table("Leaderboard", ("model", "Elo", "95 % interval"), rows)]


def _ppo(history: StageHistory, store: Store) -> list[dict[str, Any]]:
    if not history.metrics:
        return []
    parts = [_chart("Curves", "By iteration.", charts.lines(history.metrics, "step", PPO_CURVES))]
    alarms = [
        [row["step"], ", ".join(name.removeprefix("alarm/") for name in raised)]
        for row in history.metrics
        if (raised := [name for name, value in row.items() if name.startswith("alarm/") and value])
    ]
    if alarms:
        parts.append(_table("Alarms", ("iteration", "alarm"), alarms))
    earlier = {
        f"{record.key[:6]}, {str(record.provenance.get('finished'))[:16]}": _metrics_of(attempts_at(record.key, store))
        for record in earlier_results(history.planned, store)[-EARLIER:]
    }
    spec = charts.frontier({**earlier, "this run": history.metrics})
    text = "Up and to the left is better: score for little drift. Earlier runs of this stage are laid over."
    return [*parts, _chart("Reward against KL", text, spec)]


def _metrics_of(attempts: Sequence[AttemptHistory]) -> Sequence[Row]:
    return joined([attempt.metrics.rows for attempt in attempts])


def _evaluate(history: StageHistory, store: Store) -> list[dict[str, Any]]:  # noqa: ARG001 - as the others
    metrics = history.record.metrics if history.record else {}
    rows = [
        [name, _two(metrics, f"{stem}/before"), _two(metrics, f"{stem}/after"), interval]
        for name, stem, interval in (
            ("judge", "judge", _interval(metrics)),
            ("score", "score", ""),
            ("length, tokens", "length", ""),
            ("distinct bigrams", "distinct_2", ""),
        )
        if f"{stem}/before" in metrics
    ]
    return [_table("Before and after", ("", "before", "after", "difference (95 % interval)"), rows)] if rows else []


def _two(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.2f}"


def _interval(metrics: Mapping[str, float]) -> str:
    if "judge/delta" not in metrics:
        return ""
    return f"{metrics['judge/delta']:+.2f} ({metrics['judge/delta_low']:+.2f} to {metrics['judge/delta_high']:+.2f})"


def _file(record: ActionRecord | None, name: str, store: Store) -> Any:
    """Return the JSON of a result's file; None where there is none, also because it was collected."""
    if record is None:
        return None
    try:
        if all(file.path != name for file in store.manifest(record.artifact).files):
            return None
        return json.loads(store.read_file(record.artifact, name))
    except (OSError, ValueError, RlhfError):
        return None


def _changes(history: StageHistory, store: Store) -> list[dict[str, Any]]:
    """Return what a stage's result was made from that its previous run was not."""
    if history.record is None or not (earlier := earlier_results(history.planned, store)):
        return []
    before = earlier[-1]
    changed = diff_document(before, history.record, store)["changes"]
    return [{"stage": history.name, "before": before.key[:12], "changes": changed}] if changed else []


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
        made = one["provenance"]
        hosts = ", ".join(made.get("hosts") or [made.get("host") or ""])
        stage, key = one["stage"] or "from outside", one["key"] or ""
        rows[one["artifact"]] = [stage, key[:12], one["artifact"][:12], str(made.get("finished") or ""), hosts]

    walk(document)
    made = document["provenance"]
    total = made["total"]
    gpu_hours = "an unknown number of" if total["gpu_hours"] is None else total["gpu_hours"]
    cost = f"{duration(total['seconds'])} of work, {gpu_hours} GPU-hours, {total['results']} results"
    versions = {"Python": made.get("python"), "code": made.get("commit"), **made.get("versions", {})}
    return {"rows": list(rows.values()), "cost": cost, "versions": versions}


def _samples(histories: Mapping[str, StageHistory], store: Store) -> list[dict[str, Any]]:
    """Return responses through the iterations, and those before and after, with texts cut to their beginnings."""
    rows: list[dict[str, Any]] = []
    for history in histories.values():
        kept = [row | {"stage": history.name} for row in history.samples[-MOST_SAMPLES:]]
        for row in kept or _evaluated(history, store):
            shown = {
                name: row[name]
                for name in ("stage", "step", "score", "ended", "watched", "score_before")
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
        return [row | {"stage": history.name} for row in evaluated_samples(history, store).rows]
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
    specs = [part["spec"] for section in shown["sections"] for part in section["parts"] if "spec" in part]
    data = json.dumps(_finite({"specs": specs, "samples": shown["samples"]}), separators=(",", ":"), default=str)
    scripts = [script, (here / "page.js").read_text(encoding="utf-8")]
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


def _finite(value: Any) -> Any:
    """Return a value without numbers that JSON lacks, which become null."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _allowed(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _state_in_words(symptom: Symptom) -> str:
    return {True: "yes", False: "no", None: "not known"}[symptom.holds]
