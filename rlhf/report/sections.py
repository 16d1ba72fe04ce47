"""What the page shows of each stage: its curves, charts, tables and notes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.errors import RlhfError
from rlhf.history.reading import (
    AttemptHistory,
    Row,
    StageHistory,
    attempts_at,
    earlier_results,
    joined,
)
from rlhf.report import charts
from rlhf.store import ActionRecord, Store

Part = dict[str, Any]
EARLIER = 5
"""Earlier runs that are laid over."""
QUALITY, LEADERBOARD = "quality.json", "leaderboard.json"
SFT_CURVES = {"loss": "loss", "mean_token_accuracy": "accuracy"}
RM_CURVES = {"loss": "loss", "accuracy": "accuracy"}
DPO_CURVES = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "difference of rewards"}
PPO_CURVES = {
    "objective/scores": "mean score",
    "objective/kl": "KL, nats",
    "length/mean": "mean length, tokens",
    "policy/entropy_avg": "entropy, nats a token",
}


def sections(history: StageHistory, store: Store) -> list[Part]:
    """Return the charts and tables of a stage, and what it told the user; none of a stage that has nothing to show."""
    known = {"sft": _sft, "rm": _rm, "rank": _rank, "dpo": _dpo, "evaluate": _evaluate}
    known |= dict.fromkeys(("ppo", "grpo", "rloo"), _ppo)
    make = known.get(history.planned.stage.name)
    parts = make(history, store) if make else []
    notes = dict.fromkeys(row["note"] for attempt in history.attempts for row in attempt.notes.rows)
    if parts and notes:
        parts.append({"title": "What it told", "notes": list(notes)})
    return [{"name": history.name, "parts": parts}] if parts else []


def _chart(title: str, text: str, spec: charts.Spec) -> Part:
    return {"title": title, "text": text, "spec": spec}


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Part:
    return {"title": title, "header": header, "rows": rows}


def _sft(history: StageHistory, store: Store) -> list[Part]:  # noqa: ARG001 - as the others
    if not history.metrics:
        return []
    final = history.record.metrics.get("eval/loss") if history.record else None
    held_out = "" if final is None else f" Held-out loss at the end: {final:.3f}."
    return [_chart("Loss", f"Of demonstrations, by step.{held_out}", charts.lines(history.metrics, "step", SFT_CURVES))]


def _dpo(history: StageHistory, store: Store) -> list[Part]:  # noqa: ARG001 - as the others
    if not history.metrics:
        return []
    final = history.record.metrics.get("eval/accuracy") if history.record else None
    held_out = "" if final is None else f" Of held-out pairs it orders {final:.0%} as people do."
    return [
        _chart("Pairs", f"Of training pairs, by step.{held_out}", charts.lines(history.metrics, "step", DPO_CURVES))
    ]


def _rm(history: StageHistory, store: Store) -> list[Part]:
    parts: list[Part] = []
    if history.metrics:
        parts.append(_chart("Training", "By step.", charts.lines(history.metrics, "step", RM_CURVES)))
    if (quality := result_file(history.record, QUALITY, store)) is None:
        return parts
    parts.append(_accuracies(quality))
    gaps = [
        {"gap": f"{bin_['gap_from']:.2g} to {bin_['gap_to']:.2g}", **bin_}
        for bin_ in quality.get("accuracy_by_gap", [])
        if bin_["pairs"]
    ]
    if gaps:
        spec = charts.bars(gaps, "gap", "share", "difference of strengths", "ordered as people did")
        parts.append(_chart("Accuracy by gap", "Pairs far apart should be easy.", spec))
    if bins := quality.get("calibration", {}).get("bins", []):
        text = "On the dashed line people prefer the higher score as often as the scores say."
        parts.append(_chart("Calibration", text, charts.calibration(bins)))
    return parts


def _accuracies(quality: Mapping[str, Any]) -> Part:
    """Return the table of held-out accuracies beside that of one person with the others.

    Without held-out pairs there is none, and of one draw no interval.
    """
    kinds = {"all pairs": ("accuracy", "all"), "pairs within a set": ("accuracy_within", "within")}
    rows: list[list[str]] = []
    for kind, (own, people) in kinds.items():
        if (share := quality.get(own)) and share["pairs"]:
            beside = (quality.get("beside_people", {}).get(people) or {}).get("ties_half")
            interval = f"{share['low']:.1%} to {share['high']:.1%}" if "low" in share else "unknown"
            rows.append([kind, f"{share['share']:.1%}", interval, f"{beside['human']:.1%}" if beside else ""])
    return _table("Accuracy beside people", ("held-out pairs", "reward model", "95 % interval", "a person"), rows)


def _rank(history: StageHistory, store: Store) -> list[Part]:
    if (models := result_file(history.record, LEADERBOARD, store)) is None:
        return []
    rows = [{"name": row["model"], "value": row["elo"], "low": row["low"], "high": row["high"]} for row in models]
    return [_chart("Leaderboard", "Elo with its 95 % interval.", charts.intervals(rows, "Elo"))]


def _ppo(history: StageHistory, store: Store) -> list[Part]:
    if not history.metrics:
        return []
    marks = alarm_stretches(history.metrics, _alarm_texts(history.attempts))
    text = "By iteration." + (" Where an alarm was raised, the curves are shaded." if marks else "")
    parts = [_chart("Curves", text, charts.lines(history.metrics, "iteration", PPO_CURVES, marks))]
    if marks:
        rows = [[mark["alarm"], f"{mark['from']} to {mark['to']}", mark["text"]] for mark in marks]
        parts.append(_table("Alarms", ("alarm", "iterations", "what it said first"), rows))
    earlier = {
        f"{record.key[:6]}, {str(record.provenance.get('finished'))[:16]}": _metrics_of(attempts_at(record.key, store))
        for record in earlier_results(history.planned, store)[-EARLIER:]
    }
    spec = charts.frontier({**earlier, "this run": history.metrics})
    text = "Up and to the left is better: score for little drift. Earlier runs of this stage are laid over."
    return [*parts, _chart("Reward against KL", text, spec)]


def alarm_stretches(rows: Sequence[Row], texts: Mapping[str, str]) -> list[Row]:
    """Return each unbroken stretch of steps in which an alarm was raised: "alarm", "from", "to" and its "text".

    texts  what alarms said, by their names
    """
    stretches: list[Row] = []
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("alarm/"))
    for metric in names:
        name, before = metric.removeprefix("alarm/"), False
        for row in rows:
            raised = bool(row.get(metric))
            if raised and before:
                stretches[-1]["to"] = row["step"]
            elif raised:
                stretches.append({"alarm": name, "from": row["step"], "to": row["step"], "text": texts.get(name, "")})
            before = raised
    return stretches


def _alarm_texts(attempts: Sequence[AttemptHistory]) -> dict[str, str]:
    """Return what each alarm said when it was first raised."""
    said: dict[str, str] = {}
    for attempt in attempts:
        for row in attempt.notes.rows:
            said.setdefault(str(row.get("alarm")), row["note"])
    return said


def _metrics_of(attempts: Sequence[AttemptHistory]) -> Sequence[Row]:
    return joined([attempt.metrics.rows for attempt in attempts])


def _evaluate(history: StageHistory, store: Store) -> list[Part]:  # noqa: ARG001 - as the others
    metrics = history.record.metrics if history.record else {}
    names = {"judge": "judge", "score": "score", "length, tokens": "length", "distinct bigrams": "distinct_2"}
    policies = [name.removeprefix("length/") for name in metrics if name.startswith("length/")]
    if "before" not in policies:
        return []
    deltas = [("delta", "difference, prompt by prompt")] if policies == ["before", "after"] else []
    columns = [*((policy, policy) for policy in policies), *deltas]
    rows = [
        [name, *(_with_interval(metrics, f"{stem}/{side}") for side, _ in columns)]
        for name, stem in names.items()
        if f"{stem}/before" in metrics
    ]
    distances = {name: metrics.get("kl/response" if name == "after" else f"kl/{name}") for name in policies}
    rows.append(["KL, nats a response", *("" if kl is None else f"{kl:.2f}" for kl in distances.values())])
    rows[-1] += [""] * len(deltas)
    title = "Before and after, with 95 % intervals" if deltas else "Policies side by side, with 95 % intervals"
    parts = [_table(title, ("", *(shown for _, shown in columns)), rows)]
    wins = [name for name in metrics if name.startswith("win/") and f"{name}_low" in metrics]
    if wins:
        shown = [
            [name.removeprefix("win/").replace("_over_", " over "), _with_interval(metrics, name)] for name in wins
        ]
        parts.append(_table("Win rates, with intervals that hold together at 95 %", ("", "wins"), shown))
    figure, unit = ("judge", "mean rating") if "judge/before" in metrics else ("score", "mean score")
    points = [
        {
            "run": name,
            "objective/kl": distances[name] or 0.0,
            "objective/scores": metrics[f"{figure}/{name}"],
            "step": 0,
        }
        for name in policies
    ]
    if len(points) > 2:
        text = f"The {figure} over the KL from the policy before; of the best of n the KL is a bound."
        parts.append(_chart("Frontier", text, charts.frontier({str(point["run"]): [point] for point in points}, unit)))
    sides = [{"name": side, **_interval(metrics, f"judge/{side}")} for side in policies]
    if all(side["value"] is not None for side in sides):
        text = "Mean rating by the judge, which no model was trained on."
        parts.append(_chart("The judge", text, charts.intervals(sides, "mean rating")))
    return parts


def _interval(metrics: Mapping[str, float], name: str) -> dict[str, float | None]:
    return {"value": metrics.get(name), "low": metrics.get(f"{name}_low"), "high": metrics.get(f"{name}_high")}


def _with_interval(metrics: Mapping[str, float], name: str) -> str:
    """Return a figure with its interval; without either where it was not measured."""
    value, low, high = _interval(metrics, name).values()
    sign = "+" if name.endswith("/delta") else ""
    if value is None:
        return ""
    between = "" if low is None or high is None else f" ({low:{sign}.2f} to {high:{sign}.2f})"
    return f"{value:{sign}.2f}{between}"


def result_file(record: ActionRecord | None, name: str, store: Store) -> Any:
    """Return the JSON of a result's file; None where there is none, also because it was collected."""
    if record is None:
        return None
    try:
        if all(file.path != name for file in store.manifest(record.artifact).files):
            return None
        return json.loads(store.read_file(record.artifact, name))
    except (OSError, ValueError, RlhfError):
        return None
