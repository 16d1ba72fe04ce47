"""The pipeline as a graph in columns: every stage to the right of those that feed it.

A connection that passes columns has a lane in each, a place without a stage, so that no line crosses a stage.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.errors import shortened
from rlhf.history.reading import StageHistory
from rlhf.pipeline.documents import explain_document
from rlhf.pipeline.plan import Planned
from rlhf.store import Store
from rlhf.terminal import duration

REASON = 160
"""Characters of a stage's reason; the page has all changes further down."""


def graph(histories: Mapping[str, StageHistory], store: Store) -> dict[str, Any]:
    """Return the graph's columns of stages and lanes, and its connections: a source, lanes, and the stage it feeds."""
    sources = {
        name: sorted({wire.instance for wire in history.planned.wires.values() if wire.instance in histories})
        for name, history in histories.items()
    }
    columns = layers(sources)
    paths = connections(sources, columns)
    plans = {name: history.planned for name, history in histories.items()}
    feeds = {name: [other for other, read in sources.items() if name in read] for name in histories}
    shown = {
        name: _stage(history, plans, store) | {"sources": sources[name], "feeds": feeds[name]}
        for name, history in histories.items()
    }
    return {"columns": [[shown.get(item, {"lane": item}) for item in column] for column in columns], "paths": paths}


def layers(sources: Mapping[str, list[str]]) -> list[list[str]]:
    """Return the columns: names of stages, and lanes as "<stage>/<column>", each near what leads to it.

    sources  of each stage, in an order in which sources come first
    """
    depth: dict[str, int] = {}
    for name, read in sources.items():
        depth[name] = max((depth[source] + 1 for source in read), default=0)
    columns: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name, column in depth.items():
        columns[column].append(name)
        last = max((depth[other] for other, read in sources.items() if name in read), default=column)
        for between in range(column + 1, last):
            columns[between].append(f"{name}/{between}")
    for column in range(1, len(columns)):
        before = {name: place for place, name in enumerate(columns[column - 1])}

        def place(item: str, before: Mapping[str, int] = before, column: int = column) -> float:
            leading = sources[item] if item in sources else [item.rpartition("/")[0]]
            places = [before.get(one, before.get(f"{one}/{column - 1}", 0)) for one in leading]
            return sum(places) / len(places)

        columns[column].sort(key=place)
    return columns


def connections(sources: Mapping[str, list[str]], columns: list[list[str]]) -> list[list[str]]:
    """Return each connection as the items that its line passes, the stage that it feeds last."""
    depth = {item: number for number, column in enumerate(columns) for item in column}
    return [
        [source, *(f"{source}/{between}" for between in range(depth[source] + 1, depth[name])), name]
        for name, read in sources.items()
        for source in read
    ]


def _stage(history: StageHistory, plans: Mapping[str, Planned], store: Store) -> dict[str, Any]:
    """Return what a stage's box says: state, time, cost and attempts, why it ran or did not, how it failed."""
    record, attempts = history.record, len(history.attempts)
    made = record.provenance if record else {}
    earlier, gpus = made.get("earlier_attempts", []), made.get("gpus")
    seconds = record.seconds + sum(attempt["seconds"] for attempt in earlier) if record else 0.0
    cost = [duration(seconds)] if record else []
    if record and gpus is not None:
        gpu_seconds = record.seconds * gpus + sum(one["seconds"] * (one["gpus"] or 0) for one in earlier)
        cost.append(f"{gpu_seconds / 3600:.3g} GPU-hours")
    tries = len(earlier) + 1 if record else attempts
    if tries > 1:
        cost.append(f"{tries} attempts")
    progress = history.attempts[-1].progress if attempts and record is None else None
    failure = history.attempts[-1].failure if attempts and record is None else None
    return {
        "name": history.name,
        "uses": history.planned.stage.name,
        # To the reader of a finished run "cached" would mean that it was not this one's.
        "state": "done" if history.state == "cached" else history.state,
        "why": shortened(_reason(history, plans, store), REASON),
        "cost": ", ".join(cost),
        "progress": f"{progress.done} of {progress.total}: {progress.message}" if progress else "",
        "failed": str(failure or ""),
    }


def _reason(history: StageHistory, plans: Mapping[str, Planned], store: Store) -> str:
    """Return why a stage with a result was run, and why another has its state."""
    record = history.record
    if record is None or record.stage == "import":
        return history.why
    made = explain_document(history.planned, plans, store)["made"]
    if made is None:
        return (
            "ran for the first time" if not record.provenance.get("previous") else "ran anew; its result before is gone"
        )
    return f"ran because of {'; '.join(made['changes'])}" if made["changes"] else "ran because its result was lost"
