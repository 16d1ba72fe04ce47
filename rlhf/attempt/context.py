"""What a stage's code is given, on every rank."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from rlhf.attempt import liveness
from rlhf.attempt.folder import AttemptFolder, Progress
from rlhf.config.base import Settings

S_co = TypeVar("S_co", bound=Settings, covariant=True)

_TIMES_KEPT = 64
"""Of more times than this, every second one is dropped."""


@dataclass(frozen=True)
class Context(Generic[S_co]):
    """A stage's settings, its inputs, and the folders for its result and other files.

    Driver and ranks share the attempt's folder; what a stage tells the user passes through files there.
    """

    stage: str
    """The instance's name in the pipeline."""
    key: str
    settings: S_co
    inputs: Mapping[str, Path]
    """Role to folder. A role whose artifact does not exist yet is missing, which only a preflight sees."""
    output: Path
    """An empty folder: the artifact's payload."""
    attempt: Path
    """For files beside the result: logs, metrics, checkpoints, the quarantine of bad rows."""
    cache: Path
    """Kept from run to run: files that were fetched."""
    attempts: tuple[Path, ...] = ()
    """All attempts at this key, oldest first, this one included."""
    tracking: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """``sinks``, their names, and what else ``TrackedStage`` in rlhf/tracking has; empty without sinks."""

    @property
    def folder(self) -> AttemptFolder:
        """The attempt's folder with the names of its files."""
        return AttemptFolder(self.attempt)

    def progress(self, message: str, done: int = 0, total: int = 0) -> None:
        """Tell the user how far the stage is.

        done, total  steps; total 0 means that they are not counted
        """
        now, before = time.time(), self.folder.progress.get()
        times = list(before.times) if before is not None and before.total == total else []
        if any(step > done for _, step in times):  # the stage began anew
            times = []
        if total and (not times or done > times[-1][1]):
            times.append((now, done))
        if len(times) > _TIMES_KEPT:
            times = [*times[:-1:2], times[-1]]
        self.folder.progress.write(Progress(message, done, total, now, tuple(times)))
        liveness.beat()

    def origin(self, values: Mapping[str, object]) -> None:
        """Record where external things came from: source, revision or digest, licence. Only the lineage shows it."""
        self.folder.origin.write(values)

    def note(self, line: str, **facts: str) -> None:
        """Show the user one line and keep it.

        facts  kept beside it, such as the name of the alarm that says it
        """
        liveness.beat()
        with self.folder.note_lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"note": line, **facts}) + "\n")
