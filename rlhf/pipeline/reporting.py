"""What a run and its user tell each other: reports, and requests to stop."""

import threading
from bisect import bisect_left
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlhf.attempt.folder import AttemptFolder, Progress


class Reporter(Protocol):
    """Shows a run to its user; threads call it as they like."""

    def update(self, stage: str, **changes: Any) -> None:
        """Change what is shown of a stage."""
        ...

    def line(self, text: str) -> None:
        """Show a line that stays."""
        ...


class Watch:
    """Carries an attempt's progress and notes from its folder to the reporter, a few times a second."""

    def __init__(self, reporter: Reporter, stage: str, attempt: Path) -> None:
        self._reporter, self._stage, self._folder = reporter, stage, AttemptFolder(attempt)
        self._notes_shown = 0
        self._shown: Progress | None = None

    def __call__(self) -> None:
        """Look once."""
        notes = self._folder.notes()
        for note in notes[self._notes_shown :]:
            self._reporter.line(f"{self._stage}: {note}")
        self._notes_shown = len(notes)
        progress = self._folder.progress.get()
        if progress is not None and progress != self._shown:
            self._shown = progress
            self._reporter.update(self._stage, message=progress.message, done=progress.done, total=progress.total)


class Eta:
    """Measures the seconds left from the later half of the steps seen.

    The first step seen never counts: it holds a compilation or a warm-up. Nor do the steps before a resume, which this
    process has not seen.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []
        self._total = 0

    def observe(self, now: float, done: int, total: int) -> None:
        """Note how many of the steps are done; going backwards or another total is a new beginning."""
        if total != self._total or (self._seen and done < self._seen[-1][1]):
            self._seen, self._total = [], total
        if not self._seen or done > self._seen[-1][1]:
            self._seen.append((now, done))

    def remaining(self, now: float) -> float | None:
        """Return the seconds left, at least 0, or None before two steps have passed."""
        seen, total = list(self._seen), self._total  # a drawing thread asks while another observes
        if len(seen) < 3 or total <= 0:
            return None
        last_time, last_done = seen[-1]
        middle = (seen[0][1] + last_done) / 2
        index = bisect_left(seen, middle, key=lambda step: step[1])
        start_time, start_done = seen[min(max(index, 1), len(seen) - 2)]
        seconds_per_step = (last_time - start_time) / (last_done - start_done)
        return max(0.0, seconds_per_step * (total - last_done) - (now - last_time))


class Stop:
    """Whether a run was asked to stop, and whether anybody looks: what is asked of nobody must be enforced.

    Signal handlers and threads share it.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._aborted = threading.Event()
        self._heeding: set[object] = set()

    @property
    def asked(self) -> bool:
        """Whether the run shall stop."""
        return self._asked.is_set()

    @property
    def aborted(self) -> bool:
        """Whether the run shall stop now, and what is not saved yet be lost."""
        return self._aborted.is_set()

    def abort(self) -> None:
        """Have everything stop that heeds it, without saving."""
        self._aborted.set()
        self._asked.set()

    def ask(self) -> bool:
        """Ask the run to stop; whether somebody heeds it."""
        self._asked.set()
        return bool(self._heeding)

    @contextmanager
    def heeded(self) -> Generator[None]:
        """Inside, the caller looks at ``asked`` a few times a second."""
        me = object()
        # No lock: a signal's handler that met one taken in its own thread would wait for ever.
        self._heeding.add(me)
        try:
            yield
        finally:
            self._heeding.discard(me)
