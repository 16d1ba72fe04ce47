"""Watch a run from outside, and read its samples: what ``watch``, ``samples`` and the block below ``run``'s table show.

Everything comes out of the store, by rlhf/history. Texts are shown with their control characters replaced.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf.errors import NextCommand, RlhfError, StoreUnreachableError, TryAgainError, shortened
from rlhf.history.reading import AttemptHistory, StageHistory, attempts_at, joined, pipeline_history, prompt_text
from rlhf.pipeline.plan import Planned
from rlhf.pipeline.reporting import outcome
from rlhf.store import LEASE_SECONDS, Store
from rlhf.terminal import Display, StageRow, printable, printable_lines

Row = Mapping[str, Any]

CURVES = {
    "score": "objective/scores",
    "KL": "objective/kl",
    "length": "length/mean",
    "accuracy": "accuracy",
    "loss": "loss",
    "memory": "memory/peak_gb",
}
"""What is drawn of a running stage, where it has such a metric."""
_BARS = "▁▂▃▄▅▆▇█"
_LONGEST = 60
_LINES_SHOWN = 4
_LONGEST_TEXT = 2000
"""Characters of a prompt or response that are shown of a sample."""
QUIET_SECONDS = 60.0
"""How long nothing may work on a pipeline before its run counts as ended: between stages a run holds no lease."""
VANISHED_SECONDS = 10.0
"""The same where a stage has stopped without result or error: a run that waits for its lease has it by then."""


# ---- a running stage


def curve(values: Sequence[float], width: int, height: int = 1) -> str:
    """Return a curve of ``height`` lines of at most ``width`` characters.

    A column is the mean of a stretch of values, or ``!`` if that is not finite.
    """
    count = min(width, len(values))
    stretches = [values[len(values) * n // count : len(values) * (n + 1) // count] for n in range(count)]
    # Divided first: the sum of finite numbers may be infinite.
    means = [sum(value / len(part) for value in part) for part in stretches]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    flat = not high / 2 - low / 2 > 1e-12 * max(-low, high)  # equal values differ by the rounding of their means

    def column(mean: float) -> str:
        """Return a column from its top to its bottom."""
        if not math.isfinite(mean):
            return "!".rjust(height)
        share = (mean / 2 - low / 2) / (high / 2 - low / 2) if not flat else 0.5
        full, part = divmod(min(int(share * len(_BARS) * height), len(_BARS) * height - 1), len(_BARS))
        return (_BARS[part] + _BARS[-1] * full).rjust(height)

    return "\n".join(map("".join, zip(*map(column, means), strict=True)))


def curves(rows: Sequence[Row], width: int, height: int = 1) -> RenderableType:
    """Return a curve of each metric in `CURVES`, with its last value; the first one is of ``height`` lines."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column(no_wrap=True)
    for label, metric in CURVES.items():
        if values := [float(row[metric]) for row in rows if metric in row]:
            lines = height if not table.row_count else 1
            drawn = curve(values, max(4, min(_LONGEST, width - 22)), lines)
            first = "\n" * (lines - 1) + f"from {values[0]:.4g}" if lines > 1 else ""
            table.add_row(Text(f"  {label}", "dim"), Text(drawn, "cyan"), f"{values[-1]:.4g}{first}")
    return table


def stage_block(attempts: Sequence[AttemptHistory], width: int, height: int = 1) -> RenderableType | None:
    """Return curves, alarms and the latest sample of a stage that runs; None before its first step."""
    rows = joined([attempt.metrics.rows for attempt in attempts])
    if not rows:
        return None
    parts: list[RenderableType] = [curves(rows, width, height)]
    parts += [_indented(Text(f"! {line}", "bold red"), 2) for line in raised_alarms(rows)]
    samples = next((found for attempt in reversed(attempts) if (found := attempt.newest_samples)), ())
    if samples:
        parts.append(_indented(_latest_sample(samples[0], width - 2), 2))
    return Group(*parts)


def raised_alarms(rows: Sequence[Row]) -> list[str]:
    """Return a line for each alarm of a run: when it was first raised, and whether it still is."""
    lines: list[str] = []
    for metric in dict.fromkeys(name for row in rows for name in row if name.startswith("alarm/")):
        steps = [row["step"] for row in rows if row.get(metric)]
        if steps:
            still = "and still" if rows[-1].get(metric) else f"last at {steps[-1]}"
            lines.append(f"alarm {printable(metric.removeprefix('alarm/'))} since iteration {steps[0]}, {still}")
    return lines


def _latest_sample(sample: Row, width: int) -> Group:
    response = Text(_brief(sample["response"], _LINES_SHOWN * width))
    head = Text(f"sample of iteration {sample['step']}, score {_score(sample['score'])}", "dim")
    return Group(head, Text(_brief(prompt_text(sample["prompt"]), width), "dim italic"), response)


def _brief(text: Any, limit: int) -> str:
    """Return a text as one printable line of at most ``limit`` characters."""
    return shortened(printable(str(text)[: 4 * limit]), max(limit, 2))


def _score(score: Any) -> str:
    if not isinstance(score, (int, float)):
        return shortened(printable(str(score)), _LONGEST)
    return f"{score:+.2f}" if abs(score) < 1e6 else f"{score:+.3g}"


def detail(
    store: Store, width: Callable[[], int], *, here: bool, height: int = 1
) -> Callable[[StageRow], RenderableType | None]:
    """Return the ``detail`` of a `Display`: the block of a running stage.

    here    look for attempts on this machine only, and do not ask a bucket
    height  lines of the first curve
    """

    def block(row: StageRow) -> RenderableType | None:
        with suppress(OSError, RlhfError):  # what shows a run must not end it
            if row.key is None:
                return None
            local = [AttemptHistory(store, row.key, path.name) for path in store.attempts(row.key)]
            return stage_block(local if here else attempts_at(row.key, store), width(), height)
        return None

    return block


# ---- a run of another process


@dataclass
class Follower:
    """Carries the state of a pipeline's run from the store to a display.

    targets  of the run; without any, the whole pipeline
    plan     plans them anew
    """

    targets: Sequence[str]
    plan: Callable[[], Mapping[str, Planned]]
    store: Store
    display: Display
    clock: Callable[[], float] = time.monotonic
    _states: dict[str, str] = field(default_factory=dict, init=False)
    _reports: dict[str, Any] = field(default_factory=dict, init=False)
    _notes: dict[str, int] = field(default_factory=dict, init=False)
    _beats: dict[str, tuple[Any, float]] = field(default_factory=dict, init=False)

    def follow(self, sleep: Callable[[float], None] = time.sleep) -> None:
        """Return when all stages have results.

        Raises:
            RlhfError: the error that ended the run.
            TryAgainError: nothing works on the pipeline, and a result is missing.
            StoreUnreachableError: the store has not answered for QUIET_SECONDS.
        """
        worked_at = answered_at = self.clock()
        said = False
        while True:
            try:
                histories = pipeline_history(self.plan(), self.store)
                running = [name for name, history in histories.items() if self._is_alive(history)]
                for name, history in histories.items():
                    self._show(history, running=name in running)
                answered_at = self.clock()
            except StoreUnreachableError as error:
                if self.clock() - answered_at > QUIET_SECONDS:
                    raise
                self.display.line(f"{error.what}; trying again")
            else:
                worked_at = answered_at if running else worked_at
                if self._has_ended(histories, running=bool(running), quiet=answered_at - worked_at):
                    return
                if not (running or self._reports or said):
                    self.display.line(f"nothing runs; waiting {QUIET_SECONDS:.0f} s for a run to begin")
                    said = True
            sleep(self._seconds_between_looks)

    @property
    def _seconds_between_looks(self) -> float:
        return 1.0 if self.store.bucket is None else 5.0

    def _is_alive(self, history: StageHistory) -> bool:
        """Return whether a process works on a stage; one of another machine is gone when its lease stops beating."""
        key = history.planned.key if history.state == "running" else None
        holder = self.store.holder(key) if key else None
        if holder is None:
            self._beats.pop(history.name, None)
            return False
        now, beat = self.clock(), (holder.token, holder.count)
        if self._beats.get(history.name, (None, now))[0] != beat:
            self._beats[history.name] = beat, now
        return now - self._beats[history.name][1] <= LEASE_SECONDS

    def _show(self, history: StageHistory, *, running: bool) -> None:
        name, record, before = history.name, history.record, self._states.get(history.name)
        if running:
            self._states[name] = "running"
            self._show_running(history)
            return
        if record is not None:
            state = "cached" if before in (None, "cached") else "done"
        else:
            state = history.state if history.state in ("failed", "unused") else "waiting"
        if state == before:
            return
        self._states[name] = state
        changes: dict[str, Any] = {"state": state, "key": history.planned.key, "why": history.why}
        if record is not None and state == "done":
            message = outcome(history.planned.stage, record.metrics)
            changes |= {
                "why": history.planned.why,
                "message": message,
                "done": 0,
                "total": 0,
                "seconds": record.seconds,
            }
        self.display.update(name, **changes)

    def _show_running(self, history: StageHistory) -> None:
        name, attempt = history.name, history.attempts[-1] if history.attempts else None
        if attempt is None or attempt.failure is not None:  # the lease is held, and its attempt not made yet
            return
        for row in attempt.notes.rows[self._notes.get(attempt.name, 0) :]:
            self.display.line(f"{name}: {row['note']}")
        self._notes[attempt.name] = len(attempt.notes.rows)
        progress = attempt.progress
        report = (attempt.name, progress)
        if self._reports.get(name) == report:
            return
        self._reports[name] = report
        self.display.take_over(name, age(attempt.name), progress)
        shown = {"message": progress.message, "done": progress.done, "total": progress.total} if progress else {}
        changes = {"state": "running", "key": history.planned.key, "why": history.planned.why}
        self.display.update(name, **changes, **shown)

    def _has_ended(self, histories: Mapping[str, StageHistory], *, running: bool, quiet: float) -> bool:
        """Return whether all stages have results; raise the error that ended the run before that."""
        missing = [history for history in histories.values() if history.record is None and history.state != "unused"]
        if running or not missing:
            return not missing
        failed = [history for history in missing if history.state == "failed"]
        if failed and (quiet > QUIET_SECONDS or failed[0].name in self._reports):
            raise failed[0].attempts[-1].failure or RlhfError(failed[0].why, self.store.address)
        vanished = any(history.name in self._reports for history in missing)
        if quiet > (VANISHED_SECONDS if vanished else QUIET_SECONDS):
            reason = "the run was interrupted or killed" if vanished else "no run has begun, or the last one has ended"
            what = f"{reason}: nothing has worked on it for {quiet:.0f} s; {missing[0].name}: {missing[0].why}"
            raise TryAgainError(what, self.store.address, NextCommand("run", tuple(self.targets)))
        return False


def age(attempt: str) -> float:
    """Return the seconds since an attempt was begun, by its name, which its own machine's clock has made."""
    moment = datetime.strptime(attempt.split("-")[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return max(0.0, (datetime.now(UTC) - moment).total_seconds())


# ---- samples


def samples_view(rows: Sequence[Row]) -> Group:
    """Return samples, each prompt above its responses; a prompt that repeats is shown once."""
    parts: list[RenderableType] = []
    before = None
    for row in rows:
        prompt = prompt_text(row["prompt"])
        if prompt != before:
            parts += [Text(""), Text(_cut(prompt), "bold")]
            before = prompt
        parts += [_response(name, row) for name in ("before", "response") if name in row]
    return Group(*parts[1:])


def _response(name: str, row: Row) -> Group:
    facts = [f"iteration {row['step']}"] if "step" in row else ["before" if name == "before" else "after"]
    if row.get("finished"):
        facts = ["after the last update"]
    facts.append(f"score {_score(row['score_before' if name == 'before' else 'score'])}")
    if row.get("ended") is False:
        facts.append("not ended")
    text = Text(_cut(str(row[name]).strip()), overflow="fold")
    return Group(_indented(Text(", ".join(facts), "dim"), 2), _indented(text, 4))


def _indented(part: RenderableType, columns: int) -> Padding:
    # Not expanded: spaces at the ends of lines would be copied with the text.
    return Padding(part, (0, 0, 0, columns), expand=False)


def _cut(text: str) -> str:
    """Return a text for people to read, with a long one's end left out."""
    rest = len(text) - _LONGEST_TEXT
    return printable_lines(text[:_LONGEST_TEXT]) + (f" … {rest} more characters" if rest > 0 else "")
