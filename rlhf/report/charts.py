"""Charts of a report, as Vega-Lite specifications that hold their data."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

Row = Mapping[str, Any]
Spec = dict[str, Any]


def lines(rows: Sequence[Row], x: str, names: Mapping[str, str]) -> Spec:
    """Return curves above one another, one for each metric.

    rows   of metrics
    x      the metric on the common axis
    names  of the metrics, to the titles of their axes
    """
    panels = [
        _base([{"x": row[x], "y": row[name]} for row in rows if x in row and name in row])
        .mark_line(point=len(rows) < 60, clip=True)
        .encode(
            alt.X("x:Q", title=x),
            alt.Y("y:Q", title=title, scale=alt.Scale(zero=False)),
            tooltip=[alt.Tooltip("x:Q", title=x), alt.Tooltip("y:Q", title=title, format=".4g")],
        )
        .properties(width="container", height=110)
        for name, title in names.items()
        if any(x in row and name in row for row in rows)
    ]
    return {"panels": [panel.to_dict() for panel in panels]}


def frontier(runs: Mapping[str, Sequence[Row]]) -> Spec:
    """Return mean score against KL, an iteration a point, one curve for each run.

    runs  names to rows of metrics, the present run last
    """
    rows = [
        {"run": name, "kl": row["objective/kl"], "score": row["objective/scores"], "iteration": row["step"]}
        for name, metrics in runs.items()
        for row in metrics
        if "objective/kl" in row and "objective/scores" in row
    ]
    chart = (
        _base(rows)
        .mark_line(point=True)
        .encode(
            alt.X("kl:Q", title="KL, nats a response"),
            alt.Y("score:Q", title="mean score", scale=alt.Scale(zero=False)),
            alt.Color("run:N", title="run", sort=list(runs)),
            alt.Order("iteration:Q"),
            tooltip=["run:N", "iteration:Q", alt.Tooltip("kl:Q", format=".4g"), alt.Tooltip("score:Q", format=".4g")],
        )
        .properties(width="container", height=260)
    )
    return {"panels": [chart.to_dict()]}


def bars(rows: Sequence[Row], x: str, y: str, x_title: str, y_title: str) -> Spec:
    """Return a bar for each row, with an interval where it has "low" and "high"."""
    base = _base(rows).encode(alt.X(f"{x}:O", title=x_title, sort=None))
    parts: list[Any] = [base.mark_bar(opacity=0.7).encode(alt.Y(f"{y}:Q", title=y_title))]
    if rows and rows[0].get("low") is not None:
        parts.append(base.mark_rule(strokeWidth=2).encode(alt.Y("low:Q", title=y_title), alt.Y2("high:Q")))
    return {"panels": [alt.layer(*parts).properties(width="container", height=180).to_dict()]}


def _base(rows: Sequence[Row]) -> alt.Chart:
    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))
