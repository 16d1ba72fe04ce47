"""What a stage's code is given, on whatever worker it runs."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from rlhf.attempt import liveness
from rlhf.config.base import Settings

S_co = TypeVar("S_co", bound=Settings, covariant=True)

PROGRESS = "progress.json"
"""In an attempt: the message, the steps done and their total, and when steps were done, from which the time left is
measured."""
_TIMES_KEPT = 64
"""A long stage's earlier times are thinned out to about so many."""
NOTES = "notes.jsonl"
ORIGIN = "origin.json"
"""In an attempt: what a stage says of the things that came from outside."""
STOP = "stop"
"""In an attempt: a file that asks its ranks to save and stop."""
FAILURE = "failure.json"
"""In an attempt: what, where and next of the error that ended it, for ``rlhf status``."""


@dataclass(frozen=True)
class Context(Generic[S_co]):
    """A stage's settings, its inputs, and where its result goes.

    Driver and workers share the attempt's folder; what a stage tells the user passes through files there.
    """

    stage: str
    """The instance's name in the pipeline."""
    key: str
    settings: S_co
    inputs: Mapping[str, Path]
    """Role to folder. A role whose artifact is not there yet is missing, which only a preflight sees."""
    output: Path
    """An empty folder: the artifact's payload."""
    attempt: Path
    """For files beside the result: logs, metrics, checkpoints, the quarantine of bad rows."""
    cache: Path
    """Kept from run to run: files that were fetched."""
    attempts: tuple[Path, ...] = ()
    """All attempts at this key, oldest first, this one included."""
    tracking: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    """Weights & Biases: mode, project, entity and group."""

    def progress(self, message: str, done: int = 0, total: int = 0) -> None:
        """Tell the user how far the stage is.

        done, total  steps; total 0 means that they are not counted
        """
        path, now = self.attempt / PROGRESS, time.time()
        times = _times(path, done, total)
        if total and (not times or done > times[-1][1]):
            times.append((now, done))
        if len(times) > _TIMES_KEPT:
            times = [*times[:-1:2], times[-1]]
        # Several ranks may tell at once: each its own file, and the last one stands.
        temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        values = {"message": message, "done": done, "total": total, "at": now, "times": times}
        temporary.write_text(json.dumps(values))
        temporary.replace(path)
        liveness.beat()

    def origin(self, values: Mapping[str, object]) -> None:
        """Say where what came from outside came from: source, revision or digest, licence. Only the lineage has it."""
        (self.attempt / ORIGIN).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    def note(self, line: str) -> None:
        """Show the user one line and keep it."""
        liveness.beat()
        with (self.attempt / NOTES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"note": line}) + "\n")


def _times(path: Path, done: int, total: int) -> list[tuple[float, int]]:
    """Return when earlier steps were done, as (seconds since 1970, steps), or nothing where the stage began anew."""
    if not path.exists():
        return []
    values = json.loads(path.read_text())
    times = [(float(at), int(step)) for at, step in values["times"]]
    return times if values["total"] == total and all(step <= done for _, step in times) else []
