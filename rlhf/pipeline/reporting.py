"""Between a run and its user: progress reports, the time left, and requests to stop."""

from bisect import bisect_left
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf.attempt.folder import AttemptFolder, Progress
from rlhf.pipeline.stage import Stage


class Reporter(Protocol):
    """Shows a run to its user; may be called from any thread."""

    def update(self, stage: str, **changes: Any) -> None:
        """Change the fields that are shown for a stage."""
        ...

    def line(self, text: str) -> None:
        """Show a line that stays."""
        ...


def outcome(stage: Stage, metrics: Mapping[str, float]) -> str:
    """Return the metrics that a finished stage is shown with."""
    # A group's first metrics tell most; of a task's dozens of row counts a few would tell nothing.
    figures = [(name, value) for name, value in metrics.items() if not name.endswith(("_low", "_high"))]
    first = figures[:3] if stage.runs == "workers" or len(figures) <= 3 else []
    return "  ".join(f"{metric} {value:.3g}" for metric, value in first)


@dataclass
class Watch:
    """Carries an attempt's progress and notes from its folder to the reporter, a few times a second."""

    reporter: Reporter
    stage: str
    folder: AttemptFolder
    _notes_shown: int = field(default=0, init=False)
    _shown: Progress | None = field(default=None, init=False)

    def __call__(self) -> None:
        """Look once."""
        notes = self.folder.notes()
        for note in notes[self._notes_shown :]:
            self.reporter.line(f"{self.stage}: {note}")
        self._notes_shown = len(notes)
        progress = self.folder.progress.get()
        if progress is not None and progress != self._shown:
            self._shown = progress
            self.reporter.update(self.stage, message=progress.message, done=progress.done, total=progress.total)


@dataclass
class Eta:
    """Estimates the seconds left from the later half of the observed steps.

    The first observed step never counts, since it may include a compilation or a warm-up. Steps before a resume count
    neither, since this process has not observed them.
    """

    _seen: list[tuple[float, int]] = field(default_factory=list, init=False)
    _total: int = field(default=0, init=False)

    @classmethod
    def of(cls, progress: Progress) -> "Eta":
        """Return the estimate from a progress file, by the rank's clock: that of a reader may differ."""
        eta = cls()
        for at, done in progress.times:
            eta.observe(at, done, progress.total)
        return eta

    def observe(self, now: float, done: int, total: int) -> None:
        """Record the number of steps done; a smaller number or another total starts anew."""
        if total != self._total or (self._seen and done < self._seen[-1][1]):
            self._seen, self._total = [], total
        if not self._seen or done > self._seen[-1][1]:
            self._seen.append((now, done))

    def remaining(self, now: float) -> float | None:
        """Return the seconds left, at least 0, or None before two steps have passed."""
        seen, total = list(self._seen), self._total  # another thread may observe meanwhile
        if len(seen) < 3 or total <= 0:
            return None
        last_time, last_done = seen[-1]
        middle = (seen[0][1] + last_done) / 2
        index = bisect_left(seen, middle, key=lambda step: step[1])
        start_time, start_done = seen[min(max(index, 1), len(seen) - 2)]
        seconds_per_step = (last_time - start_time) / (last_done - start_done)
        return max(0.0, seconds_per_step * (total - last_done) - (now - last_time))


@dataclass
class Stop:
    """A request to stop a run, shared by signal handlers and threads.

    asked    whether the run must stop
    aborted  whether it must stop now and lose unsaved work
    """

    # No locks: a signal handler that needs a lock held by its own thread would wait without end.
    asked: bool = False
    aborted: bool = False
    _heeding: set[object] = field(default_factory=set, init=False)

    def abort(self) -> None:
        """Ask the run to stop now, without saving."""
        self.asked = self.aborted = True

    def ask(self) -> bool:
        """Ask the run to stop; return whether a stage polls ``asked``. If not, the caller must stop the run itself."""
        self.asked = True
        return bool(self._heeding)

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Declare that the body polls ``asked`` a few times a second."""
        caller = object()
        self._heeding.add(caller)
        try:
            yield
        finally:
            self._heeding.discard(caller)
