"""The tables of the program, and the display of a run: a live table on a terminal, plain lines in a pipe or a CI log.

Functions that return a table or a string print nothing and read no clock. Text from a model or a file is shown with its
control characters replaced, so that it cannot repaint the terminal.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf.attempt.folder import Progress
from rlhf.errors import RlhfError, size
from rlhf.pipeline.reporting import Eta

State = Literal["waiting", "running", "cached", "done", "failed", "missing", "blocked", "unused"]

_STYLES = dict.fromkeys(("waiting", "blocked", "unused"), "dim") | {
    "cached": "cyan",
    "done": "green",
    "running": "bold yellow",
    "failed": "bold red",
    "missing": "yellow",
}
_GAP = 2
_METRICS_SHOWN = 3


@dataclass(frozen=True)
class StageRow:
    """The row of a stage in a table.

    seconds      time that it took, or has been running; None before its start
    message      its present activity, "step 90/120" for instance
    done, total  steps, from which the time left is computed; total 0 means that steps are not counted
    metric_text  the most important metrics, "loss 3.21" for instance
    """

    stage: str
    state: State = "waiting"
    key: str | None = None
    why: str = ""
    seconds: float | None = None
    message: str = ""
    done: int = 0
    total: int = 0
    metric_text: str = ""


def duration(seconds: float) -> str:
    """Return a length of time as ``0:20`` or, from an hour on, ``1:02:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def short_key(key: str | None) -> str:
    """Return a key's first six digits, or an empty text without a key."""
    return f"{key[:6]}…" if key else ""


def progress_text(row: StageRow, eta: float | None) -> str:
    """Return the last column of a stage: the time left while it runs, its message or steps, and its metrics."""
    steps = f"step {row.done}/{row.total}" if row.total else ""
    left = f"eta {duration(eta)} " if eta is not None and row.state == "running" else ""
    return "  ".join(part for part in (left, printable(row.message) or steps, printable(row.metric_text)) if part)


def plain_table(*, header: bool = True, **settings: Any) -> Table:
    """Return an empty table without lines between its cells."""
    return Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=header, header_style="bold", **settings)


def stages_table(rows: Sequence[StageRow], etas: Mapping[str, float | None], width: int) -> Table:
    """Return the live table of a run, a line for each stage.

    If the width is too small, ``why`` and ``progress`` are cut, then dropped; the other columns are always complete.
    """
    cells = [
        (
            row.stage,
            row.state,
            short_key(row.key),
            printable(row.why),
            "" if row.seconds is None else duration(row.seconds),
            progress_text(row, etas.get(row.stage)),
        )
        for row in rows
    ]
    header = ("stage", "state", "key", "why", "time", "progress")
    needed = {name: max(map(cell_len, column)) for name, *column in zip(header, *cells, strict=True)}
    widths = {name: max(needed[name], len(name)) for name in header}
    room = width - sum(widths[name] for name in ("stage", "state", "key", "time")) - _GAP * (len(header) - 1)
    # If there is no room for both, progress comes first; in a wide terminal the reason keeps 10 characters.
    stub = min(widths["why"], 10 if room >= 30 else 0)
    widths["progress"] = min(widths["progress"], room - stub)
    widths["why"] = min(widths["why"], room - widths["progress"])

    table = plain_table()
    shown = [name for name in header if widths[name] >= len(name)]
    for name in shown:
        justify = "right" if name == "time" else "left"
        table.add_column(name, width=widths[name], no_wrap=True, overflow="ellipsis", justify=justify)
    for row in cells:
        table.add_row(*(_cell(name, text) for name, text in zip(header, row, strict=True) if name in shown))
    return table


def plan_table(stages: Sequence[Mapping[str, Any]], *, metrics: bool = False) -> Table:
    """Return the table of ``rlhf plan``, or with ``metrics`` of ``rlhf status``, from the "stages" of its ``--json``.

    Empty columns are left out. The last column takes the width that is left, and wraps: why, and below it the progress
    of a running stage, or the first few metrics; ``--json`` has all of them.
    """
    rows: list[dict[str, str]] = []
    for stage in stages:
        why = printable(stage["why"])
        if progress := stage.get("progress"):
            row = StageRow("", "running", **{name: progress[name] for name in ("message", "done", "total")})
            why += f"\n  {progress_text(row, progress['eta_seconds'])}"
        if metrics:
            lines = [f"\n  {name} {_value(value)}" for name, value in (stage["metrics"] or {}).items()]
            more = len(lines) - _METRICS_SHOWN
            why += "".join(lines[:_METRICS_SHOWN]) + (f"\n  … {more} more" if more > 0 else "")
        seconds = "" if stage["seconds"] is None else duration(stage["seconds"])
        state = {"stage": str(stage["stage"]), "state": str(stage["state"]), "key": short_key(stage["key"])}
        rows.append(state | {"time": seconds, "why": why})
    table = plain_table()
    shown = [name for name in ("stage", "state", "key", "time", "why") if any(row[name] for row in rows)]
    for name in shown:
        table.add_column(name, no_wrap=name != "why", overflow="fold", justify="right" if name == "time" else "left")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in shown))
    return table


def samples_table(rows: Sequence[Mapping[str, Any]]) -> Group:
    """Return prompts, each above its answers before and after training with their scores, side by side.

    A row has "prompt" (a text or messages), "before", "after", "score_before" and "score_after".
    """
    parts: list[RenderableType] = [_sample(Text("score"), Text("before"), Text("score"), Text("after"), "bold")]
    for row in rows:
        before, after = float(row["score_before"]), float(row["score_after"])
        style = "green" if after > before else "red" if after < before else ""
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        parts += [Text(""), Text(_one_line(prompt), "dim")]
        scores = Text(f"{before:+.2f}"), Text(f"{after:+.2f}", style)
        parts.append(_sample(scores[0], Text(_one_line(row["before"])), scores[1], Text(_one_line(row["after"])), ""))
    return Group(*parts)


def _sample(score_before: Text, before: Text, score_after: Text, after: Text, style: str) -> Table:
    table = plain_table(header=False, expand=True, style=style)
    for name in ("before", "after"):
        table.add_column(f"{name}'s score", width=5, justify="right", no_wrap=True)
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(score_before, before, score_after, after)
    return table


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def leaderboard_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of ``rlhf leaderboard`` from the "models" of its ``--json``."""
    table = plain_table()
    table.add_column("model", overflow="fold")
    for name in ("Elo", "95 % interval", "comparisons"):
        table.add_column(name, justify="right", no_wrap=True)
    for model in models:
        # A single set has no spread over sets.
        interval = "unknown" if model["low"] is None else f"{model['low']:+.0f} to {model['high']:+.0f}"
        name = Text(printable(model["model"]))
        table.add_row(name, f"{model['elo']:+.0f}", interval, f"{model['comparisons']:.0f}")
    return table


def memory_table(forecasts: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a rank's memory from the "memory" of ``rlhf doctor --json``, a column for each stage."""
    known = [forecast for forecast in forecasts if forecast["total"] is not None]
    table = plain_table()
    table.add_column("GB on each rank", no_wrap=True)
    for forecast in known:
        table.add_column(Text(printable(forecast["stage"])), justify="right", overflow="fold")
    for part in dict.fromkeys(part for forecast in known for part in forecast["parts"]):
        table.add_row(part, *(_gigabytes(forecast["parts"].get(part)) for forecast in known))
    table.add_row("sum", *(_gigabytes(forecast["total"]) for forecast in known), style="bold")
    if any(forecast["device"] for forecast in known):
        table.add_row("available", *(_gigabytes(forecast["device"]) for forecast in known))
    table.add_row("peak", *(forecast["moment"] for forecast in known), style="dim")
    return table


def _gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def key_values(values: Mapping[str, Any]) -> Table:
    """Return a table with a name and its value in each line."""
    table = plain_table(header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(printable(_value(value))))
    return table


def gc_table(document: Mapping[str, Any]) -> Table:
    """Return a table of what garbage collection removed and what stays, from its ``--json``."""
    names = {
        "records": "results",
        "copies": "local copies",
        "unfinished": "unfinished writes",
        "quarantine": "quarantined",
        "leases": "stale leases",
    }
    stages = sorted(Counter(str(result["stage"]) for result in document["results"]).items())
    values: dict[str, str] = {}
    for kind, removed in document["removed"].items():
        if count := removed["files"]:
            files = f"{count} {'file' if count == 1 else 'files'}, {size(removed['bytes'])}"
            of_stages = ", ".join(f"{stage} {number}" for stage, number in stages)
            values[names.get(kind, kind)] = f"{count}: {of_stages}" if kind == "records" else files
    kept, nothing_removed = document["kept"], not values
    young = f", {kept['young']} of them younger than {document['grace_hours']:g} hours" if kept["young"] else ""
    values["stays"] = f"{kept['results']} results{young}, {size(kept['blobs']['bytes'])} of blobs"
    if kept["pipelines"]:
        needed = sorted(kept["pipelines"].items())
        values["needed by"] = "; ".join(f"{pipeline}: {', '.join(instances)}" for pipeline, instances in needed)
    table = key_values(values)
    table.title = ("would remove" if document["dry_run"] else "removed") + (" nothing" if nothing_removed else "")
    table.title_justify = "left"
    return table


def print_error(console: Console, error: RlhfError) -> None:
    """Print an error on a console for standard error; lines are not wrapped, so that commands can be copied whole."""
    text = Text("error: " + printable_lines(str(error)))
    text.stylize("bold red", 0, len("error:"))
    console.print(text, soft_wrap=True)


class Display:
    """Shows the progress of a run; use it as a context manager.

    On a terminal the table is redrawn in place. Elsewhere a line is printed when a stage's state changes, and while it
    runs about every 15 seconds and after every tenth of its steps.

    detail  called on a terminal with the row of a running stage at each of its steps; the result is shown below
    """

    def __init__(
        self,
        console: Console,
        stages: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
        detail: Callable[[StageRow], RenderableType | None] = lambda _: None,
    ) -> None:
        self._console = console
        self._detail = detail
        self._details: dict[str, RenderableType | None] = {}
        self._clock = clock
        self._rows = {stage: StageRow(stage) for stage in stages}
        self._etas = {stage: Eta() for stage in stages}
        self._started: dict[str, float] = {}
        self._printed: dict[str, tuple[float, int]] = {}
        drawn_in_place = console.is_terminal and not console.is_dumb_terminal
        self._live = (
            Live(console=console, get_renderable=self._render, refresh_per_second=4) if drawn_in_place else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, stage: str, **changes: Any) -> None:
        """Change fields of a stage's `StageRow`."""
        now = self._clock()
        before = self._rows[stage]
        row = replace(before, **changes)
        if row.state == "running" and stage not in self._started:
            self._started[stage] = now
            self._etas[stage] = Eta()
        if row.state == "running" and row.total:
            self._etas[stage].observe(now, row.done, row.total)
        self._rows[stage] = row
        if row.state != "running" and stage in self._started:
            elapsed = now - self._started.pop(stage)
            self._rows[stage] = replace(row, seconds=changes.get("seconds", elapsed))
        if self._live is None:
            self._print_line(stage, now, state_changed=row.state != before.state)
        elif row.state != "running":
            self._details.pop(stage, None)
        elif row.message != before.message:
            self._details[stage] = self._detail(row)

    def take_over(self, stage: str, seconds: float, progress: Progress | None) -> None:
        """Show the time of a stage that another process runs; call it before each `update` of the stage.

        seconds   since its start
        progress  its latest report, whose clock need not be this one
        """
        now = self._clock()
        self._started[stage] = now - seconds
        if progress is not None:
            times = tuple((at + now - progress.at, done) for at, done in progress.times)
            self._etas[stage] = Eta.of(replace(progress, times=times))

    def line(self, text: str) -> None:
        """Print a note: above the live table, or between the plain lines."""
        self._console.print(Text(printable_lines(text)), soft_wrap=True)

    def _print_line(self, stage: str, now: float, *, state_changed: bool) -> None:
        row = self._current(stage, now)
        printed_at, printed_done = self._printed.get(stage, (now, row.done))
        tenth_done = row.total > 0 and 10 * (row.done - printed_done) >= row.total
        if not (state_changed or tenth_done or now - printed_at >= 15.0):
            return
        self._printed[stage] = (now, row.done)
        seconds = "" if row.seconds is None else duration(row.seconds)
        progress = progress_text(row, self._etas[stage].remaining(now))
        columns = f"{row.stage:<{max(map(len, self._rows))}}", f"{row.state:<7}", short_key(row.key)
        reason = printable(row.why) if state_changed else ""  # later lines are about the progress
        line = "  ".join(part for part in (*columns, reason, seconds, progress) if part)
        self._console.print(Text(line), soft_wrap=True)

    def _current(self, stage: str, now: float) -> StageRow:
        started = self._started.get(stage)
        row = self._rows[stage]
        return row if started is None else replace(row, seconds=now - started)

    def _render(self) -> RenderableType:
        now = self._clock()
        rows = [self._current(stage, now) for stage in self._rows]
        etas = {stage: eta.remaining(now) for stage, eta in self._etas.items()}
        parts: list[RenderableType] = [stages_table(rows, etas, self._console.width)]
        for row in rows:
            if (detail := self._details.get(row.stage)) is not None:
                # In a narrow terminal the table has no room for the progress.
                parts += [Text(""), Text(f"{row.stage}  {progress_text(row, etas[row.stage])}", "bold"), detail]
        return Group(*parts)


def _cell(column: str, text: str) -> Text:
    return Text(text, _STYLES.get(text, "")) if column == "state" else Text(text, "dim" if column == "key" else "")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Return a line without characters that move the cursor or change the terminal; white space becomes spaces."""
    spaced = (" " if character.isspace() else character for character in text)
    return "".join(character if character.isprintable() else "�" for character in spaced)


def printable_lines(text: str) -> str:
    """Return a text with :func:`printable` applied to each line."""
    return "\n".join(printable(line) for line in text.splitlines())
