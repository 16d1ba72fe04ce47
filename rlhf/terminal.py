"""What a user sees while a pipeline runs: a live table on a terminal, plain lines in a pipe or a CI log.

Rendering is apart from printing: the functions that return a table or a string print nothing and ask no clock. Text
that comes from a model or a file is shown with its control characters replaced, so that no answer can repaint the
terminal.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf.errors import RlhfError, size
from rlhf.pipeline.reporting import Eta

State = Literal["waiting", "running", "cached", "done", "failed", "missing", "blocked", "unused"]

_STYLES: dict[str, str] = {
    "cached": "cyan",
    "done": "green",
    "running": "bold yellow",
    "failed": "bold red",
    "waiting": "dim",
    "missing": "yellow",
    "blocked": "dim",
    "unused": "dim",
}
_GAP = 2
_WHY_STUB = 10
_LINE_EVERY_S = 15.0
_METRICS_SHOWN = 3


@dataclass(frozen=True)
class StageRow:
    """One stage as it is shown.

    seconds      how long it took, or has been running; None where it has not started
    message      what it is doing, "step 90/120" for instance
    done, total  steps; the time left is measured from how they pass, and total 0 means that they are not counted
    metric_text  the metrics to look at, "loss 3.21" for instance
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
    """Return a key's first six digits, by which a reader tells keys apart; empty without a key."""
    return f"{key[:6]}…" if key else ""


def progress_text(row: StageRow, eta: float | None) -> str:
    """Return the last column of a stage: the time left while it runs, what it is doing, and its metrics."""
    steps = f"step {row.done}/{row.total}" if row.total else ""
    left = f"eta {duration(eta)} " if eta is not None and row.state == "running" else ""
    return "  ".join(part for part in (left, printable(row.message) or steps, printable(row.metric_text)) if part)


def stages_table(rows: Sequence[StageRow], etas: Mapping[str, float | None], width: int) -> Table:
    """Return the live table of a run, one line a stage.

    ``why`` and ``progress`` are cut where the width is too small, and left out where it is hopeless; the rest never is.
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
    # Progress goes before the reason where both cannot have what they need; only where there is room is a stub kept.
    stub = min(widths["why"], _WHY_STUB if room >= 3 * _WHY_STUB else 0)
    widths["progress"] = min(widths["progress"], room - stub)
    widths["why"] = min(widths["why"], room - widths["progress"])

    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    shown = [name for name in header if widths[name] >= len(name)]
    for name in shown:
        justify = "right" if name == "time" else "left"
        table.add_column(name, width=widths[name], no_wrap=True, overflow="ellipsis", justify=justify)
    for row in cells:
        table.add_row(*(_cell(name, text) for name, text in zip(header, row, strict=True) if name in shown))
    return table


def plan_table(stages: Sequence[Mapping[str, Any]], *, metrics: bool = False) -> Table:
    """Return the table of ``rlhf plan``, and with ``metrics`` that of ``rlhf status``, of what ``--json`` prints.

    Columns that would be empty are left out. The last takes what width there is, and folds: why, and below it how far a
    running stage is, or the first few metrics.
    """
    rows: list[dict[str, str]] = [
        {
            "stage": str(stage["stage"]),
            "state": str(stage["state"]),
            "key": short_key(stage["key"]),
            "time": "" if stage["seconds"] is None else duration(stage["seconds"]),
            "why": printable(stage["why"]) + _progress(stage) + (_metrics(stage["metrics"] or {}) if metrics else ""),
        }
        for stage in stages
    ]
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    shown = [name for name in ("stage", "state", "key", "time", "why") if any(row[name] for row in rows)]
    for name in shown:
        table.add_column(name, no_wrap=name != "why", overflow="fold", justify="right" if name == "time" else "left")
    for row in rows:
        table.add_row(*(_cell(name, row[name]) for name in shown))
    return table


def _progress(stage: Mapping[str, Any]) -> str:
    """How far a running stage is, on a line of its own; empty before it says so."""
    progress = stage.get("progress")
    if progress is None:
        return ""
    row = StageRow(
        stage["stage"], "running", message=progress["message"], done=progress["done"], total=progress["total"]
    )
    return f"\n  {progress_text(row, progress['eta_seconds'])}"


def _metrics(metrics: Mapping[str, Any]) -> str:
    """The first few metrics, each on a line of its own: what a table has room for. ``--json`` has all."""
    lines = [f"  {name} {_value(value)}" for name, value in metrics.items()]
    if len(lines) > _METRICS_SHOWN:
        lines[_METRICS_SHOWN:] = [f"  … {len(lines) - _METRICS_SHOWN} more"]
    return "".join(f"\n{line}" for line in lines)


def samples_table(rows: Sequence[Mapping[str, Any]]) -> Group:
    """Return prompts with the answers before and after training, and their scores, side by side below each prompt.

    Each row has "prompt" (a text or messages), "before", "after", "score_before" and "score_after".
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
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=False, expand=True, style=style)
    for name in ("before", "after"):
        table.add_column(f"{name}'s score", width=5, justify="right", no_wrap=True)
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(score_before, before, score_after, after)
    return table


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def leaderboard_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of ``rlhf leaderboard`` out of what its ``--json`` prints under "models"."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("Elo", "95 % interval", "comparisons"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in models:
        # Of one set alone no spread over sets is known.
        interval = "unknown" if one["low"] is None else f"{one['low']:+.0f} to {one['high']:+.0f}"
        table.add_row(Text(printable(one["model"])), f"{one['elo']:+.0f}", interval, f"{one['comparisons']:.0f}")
    return table


def key_values(values: Mapping[str, Any]) -> Table:
    """Return a summary: one name and value a line."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(printable(_value(value))))
    return table


def gc_table(document: Mapping[str, Any]) -> Table:
    """Return what garbage collection removed and what stays, out of what its ``--json`` prints."""
    stages = Counter(str(one["stage"]) for one in document["results"])
    named = {
        "records": "results",
        "copies": "local copies",
        "unfinished": "unfinished writes",
        "quarantine": "quarantined",
        "leases": "stale leases",
    }
    values: dict[str, str] = {}
    for kind, heap in document["removed"].items():
        if heap["files"]:
            files = f"{heap['files']} {'file' if heap['files'] == 1 else 'files'}, {size(heap['bytes'])}"
            of_stages = ", ".join(f"{stage} {count}" for stage, count in sorted(stages.items()))
            values[named.get(kind, kind)] = f"{heap['files']}: {of_stages}" if kind == "records" else files
    kept = document["kept"]
    young = f", {kept['young']} of them younger than {document['grace_hours']:g} hours" if kept["young"] else ""
    needed = "; ".join(f"{pipeline}: {', '.join(names)}" for pipeline, names in sorted(kept["pipelines"].items()))
    values["stays"] = f"{kept['results']} results{young}, {size(kept['blobs']['bytes'])} of blobs"
    if needed:
        values["needed by"] = needed
    table = key_values(values)
    table.title = "would remove" if document["dry_run"] else "removed"
    table.title_justify = "left"
    if len(values) == 1 + bool(needed):
        table.title += " nothing"
    return table


def usage_line(usage: Mapping[str, int]) -> str:
    """Return how much the store holds, in one line: the same files twice take their room once."""
    files, blobs, free = (size(usage[name]) for name in ("file_bytes", "blob_bytes", "free_bytes"))
    return f"store: {usage['artifacts']} artifacts, {files} of files in {blobs} of blobs, {free} free"


def print_error(console: Console, error: RlhfError) -> None:
    """Print what is wrong, where, and what to do next, on a console that writes to standard error.

    Lines are not broken, so that a path or a command can be copied whole.
    """
    text = Text("error: " + printable_lines(str(error)))
    text.stylize("bold red", 0, len("error:"))
    console.print(text, soft_wrap=True)


class Display:
    """Shows a run as it goes; use it as a context manager.

    On a terminal the table is redrawn in place. Elsewhere a line is printed when a stage's state changes, and while it
    runs one about every 15 seconds and at every tenth of its steps.
    """

    def __init__(self, console: Console, stages: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, stage: str, **changes: Any) -> None:
        """Change fields of a stage's row, those of `StageRow`."""
        now = self._clock()
        before = self._rows[stage]
        row = replace(before, **changes)
        if row.state == "running" and before.state != "running":
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

    def line(self, text: str) -> None:
        """Print a note: above the live table, or between the plain lines."""
        self._console.print(Text(printable_lines(text)), soft_wrap=True)

    def _print_line(self, stage: str, now: float, *, state_changed: bool) -> None:
        row = self._current(stage, now)
        printed_at, printed_done = self._printed.get(stage, (now, row.done))
        a_tenth_on = row.total > 0 and 10 * (row.done - printed_done) >= row.total
        if not (state_changed or a_tenth_on or now - printed_at >= _LINE_EVERY_S):
            return
        self._printed[stage] = (now, row.done)
        seconds = "" if row.seconds is None else duration(row.seconds)
        progress = progress_text(row, self._etas[stage].remaining(now))
        columns = f"{row.stage:<{max(map(len, self._rows))}}", f"{row.state:<7}", short_key(row.key)
        # The reason is told once, where the state changes: later lines are about the progress.
        reason = printable(row.why) if state_changed else ""
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
        return stages_table(rows, etas, self._console.width)


def _cell(column: str, text: str) -> Text:
    return Text(text, _STYLES.get(text, "")) if column == "state" else Text(text, "dim" if column == "key" else "")


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """Return one line with nothing in it that would move the cursor or change the terminal; white space is spaces."""
    spaced = (" " if character.isspace() else character for character in text)
    return "".join(character if character.isprintable() else "�" for character in spaced)


def printable_lines(text: str) -> str:
    """Return the lines of a text, each as :func:`printable` makes it."""
    return "\n".join(printable(line) for line in text.splitlines())
