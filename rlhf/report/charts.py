"""Charts of a report, as Vega-Lite specifications that hold their data; colours are the page's."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

Row = Mapping[str, Any]
Spec = dict[str, Any]
FIGURE = ".4g"
WHOLE = alt.Axis(tickMinStep=1, format="d")


def lines(rows: Sequence[Row], unit: str, names: Mapping[str, str], marks: Sequence[Row] = ()) -> Spec:
    """Return curves above one another, one for each metric.

    rows   of metrics, each of a "step"
    unit   what a step is, the title of the common axis
    names  of the metrics, to the titles of their axes
    marks  stretches of the axis, "from" and "to", in which an "alarm" was raised, with its "text"
    """
    panels: list[Spec] = []
    for name, title in names.items():
        points = [{"x": row["step"], "y": row[name]} for row in rows if name in row]
        if not points:
            continue
        curve = (
            _base(points)
            .mark_line(point=len(points) < 60)
            .encode(
                alt.X("x:Q", title=unit, axis=WHOLE),
                alt.Y("y:Q", title=title, scale=alt.Scale(zero=False)),
                tooltip=[alt.Tooltip("x:Q", title=unit), alt.Tooltip("y:Q", title=title, format=FIGURE)],
            )
        )
        described = f"{title} by {unit}, from {points[0]['y']:.4g} to {points[-1]['y']:.4g}"
        described += "".join(f"; alarm {mark['alarm']}, {unit} {mark['from']} to {mark['to']}" for mark in marks)
        chart = alt.layer(*_stretches(marks), curve) if marks else curve
        panels.append(_sized(chart, 110, described))
    return {"panels": panels}


def _stretches(marks: Sequence[Row]) -> list[alt.Chart]:
    """Return bands for the stretches, and a line where each begins, with its text under the pointer."""
    base = _base(marks).encode(tooltip=[alt.Tooltip(f"{name}:N") for name in ("alarm", "text", "from", "to")])
    begins = alt.X("from:Q", axis=WHOLE)
    return [
        base.mark_rect(style="alarm").encode(begins, alt.X2("to:Q")),
        base.mark_rule(style="alarm", strokeWidth=3).encode(begins),
    ]


def frontier(runs: Mapping[str, Sequence[Row]], unit: str = "mean score") -> Spec:
    """Return mean score against KL, an iteration a point, one curve for each run.

    runs  names to rows of metrics, the present run last
    unit  what is shown as the score
    """
    rows = [
        {"run": name, "kl": row["objective/kl"], "score": row["objective/scores"], "iteration": row["step"]}
        for name, metrics in runs.items()
        for row in metrics
        if "objective/kl" in row and "objective/scores" in row
    ]
    figures = [alt.Tooltip(f"{name}:Q", format=FIGURE) for name in ("kl", "score")]
    chart = (
        _base(rows)
        .mark_line(point=True)
        .encode(
            alt.X("kl:Q", title="KL, nats a response"),
            alt.Y("score:Q", title=unit, scale=alt.Scale(zero=False)),
            alt.Color("run:N", title="run", sort=list(runs)),
            alt.Order("iteration:Q"),
            tooltip=["run:N", "iteration:Q", *figures],
        )
    )
    ends = {row["run"]: f"{row['run']} ends at KL {row['kl']:.4g}, score {row['score']:.4g}" for row in rows}
    return {"panels": [_sized(chart, 260, f"{unit} against KL: {'; '.join(ends.values())}")]}


def bars(rows: Sequence[Row], x: str, y: str, x_title: str, y_title: str) -> Spec:
    """Return a bar for each row, with an interval where it has "low" and "high"."""
    across = alt.X(f"{x}:O", title=x_title, sort=None, axis=alt.Axis(labelAngle=0))
    parts: list[Any] = [_base(rows).mark_bar(opacity=0.7).encode(across, alt.Y(f"{y}:Q", title=y_title))]
    if known := [row for row in rows if row.get("low") is not None]:
        rule = _base(known).mark_rule(strokeWidth=2)
        parts.append(rule.encode(across, alt.Y("low:Q", title=y_title), alt.Y2("high:Q")))
    described = "; ".join(f"{row[x]}: {row[y]:.4g}" for row in rows)
    return {"panels": [_sized(alt.layer(*parts), 180, f"{y_title} by {x_title}: {described}")]}


def intervals(rows: Sequence[Row], unit: str) -> Spec:
    """Return a point for each row's "name" and "value", with its interval from "low" to "high" where it has one."""
    # By a number: a list of names becomes an expression, in which not every character may stand.
    order = alt.EncodingSortField("place", op="min")
    rows = [{"place": place, **row} for place, row in enumerate(rows, start=1)]
    base = _base(rows).encode(alt.Y("name:N", title=None, sort=order, axis=alt.Axis(labelLimit=120)))
    scale = alt.Scale(zero=False)
    figures = [alt.Tooltip(f"{name}:Q", format=FIGURE) for name in ("value", "low", "high")]
    points = base.mark_point(filled=True, size=70).encode(
        alt.X("value:Q", title=unit, scale=scale), tooltip=["name:N", *figures]
    )
    spans = base.mark_rule().encode(alt.X("low:Q", title=unit, scale=scale), alt.X2("high:Q"))
    known = any(row["low"] is not None for row in rows)
    described = "; ".join(f"{row['name']} {row['value']:.4g}" + _between(row) for row in rows)
    chart = alt.layer(spans, points) if known else points
    return {"panels": [_sized(chart, 30 + 28 * len(rows), f"{unit}: {described}")]}


def _between(row: Row) -> str:
    return "" if row["low"] is None else f" ({row['low']:.4g} to {row['high']:.4g})"


def calibration(bins: Sequence[Row]) -> Spec:
    """Return how often the higher score was preferred, "observed", over how often the scores predict it, "predicted".

    bins  with their number of "comparisons", which is a point's area
    """
    title = "predicted share"
    points = (
        _base(bins)
        .mark_point(filled=True)
        .encode(
            alt.X("predicted:Q", title=title, scale=alt.Scale(zero=False)),
            alt.Y("observed:Q", title="observed share", scale=alt.Scale(zero=False)),
            alt.Size("comparisons:Q", legend=None),
            tooltip=[alt.Tooltip(f"{name}:Q", format=FIGURE) for name in ("predicted", "observed", "comparisons")],
        )
    )
    ends = [{"x": x} for x in (bins[0]["predicted"], bins[-1]["predicted"])]
    diagonal = (
        _base(ends)
        .mark_line(strokeDash=[4, 3], style="aside", point=False)
        .encode(alt.X("x:Q", title=title), alt.Y("x:Q", title="observed share"))
    )
    described = "; ".join(f"{row['predicted']:.2f} predicted, {row['observed']:.2f} observed" for row in bins)
    return {"panels": [_sized(alt.layer(diagonal, points), 220, described)]}


def _sized(chart: Any, height: int, described: str) -> Spec:
    """Return a chart as wide as its place, with a text for readers who do not see it."""
    return chart.properties(width="container", height=height, description=described).to_dict()


def _base(rows: Sequence[Row]) -> alt.Chart:
    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))
