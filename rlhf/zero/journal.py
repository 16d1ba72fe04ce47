"""What a training stage reports as it goes: metrics to every sink, progress to the user. Only rank 0 writes."""

import shutil
import time
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from rlhf.config.base import semantic_values
from rlhf.pipeline.context import Context
from rlhf.tracking.metrics import MetricsLog, read_metrics
from rlhf.tracking.tracker import Tracker
from rlhf.tracking.wandb_run import WandbMode, WandbRun
from rlhf.zero import checkpoints, group


class Journal:
    """Metrics and progress of one stage, continued where the newest complete checkpoint ends.

    unit   what a step is called, for the user
    shown  metrics that the user sees as the stage runs
    """

    def __init__(self, context: Context[Any], total: int, unit: str, shown: tuple[str, ...]) -> None:
        self._context, self._total, self._unit, self._shown = context, total, unit, shown
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._alarms: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._tracker = self._open() if group.is_main() else None

    @contextmanager
    def timed(self, part: str) -> Generator[None]:
        """Count the time inside as ``time/<part>_s`` of the next logged step."""
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def log(self, step: int, metrics: Mapping[str, float], tokens: int | None = None) -> None:
        """Report a finished step, numbered from 1.

        tokens  real response tokens of the step, for ``perf/tokens_per_s``
        """
        row = dict(metrics) | {f"time/{part}_s": seconds for part, seconds in self._seconds.items()}
        if tokens is not None:
            row["perf/tokens_per_s"] = tokens / sum(self._seconds.values())
        self._seconds.clear()
        self._rows.append(row)
        if self._tracker is not None:
            self._tracker.log(step, row)
            shown = "  ".join(f"{name.split('/')[-1]} {row[name]:.3g}" for name in self._shown if name in row)
            self._context.progress(f"{self._unit} {step}/{self._total}  {shown}", step, self._total)

    def alarm(self, line: str | None) -> None:
        """Show the user a line, unless it is None; each kind of alarm once."""
        if line is not None and self._tracker is not None and (kind := line.split(":")[0]) not in self._alarms:
            self._alarms.add(kind)
            self._context.note(line)

    def first(self, name: str) -> float:
        """A metric's first value, from before a resume too; on ranks other than 0, the first since the resume."""
        return next(row[name] for row in self._rows if name in row)

    def last(self, *names: str) -> dict[str, float]:
        """Metrics' latest values."""
        return {name: next(row[name] for row in reversed(self._rows) if name in row) for name in names}

    def finish(self) -> None:
        """Close the sinks."""
        if self._tracker is not None:
            self._tracker.finish()

    def _open(self) -> Tracker:
        path = self._context.attempt / "metrics.jsonl"
        newest = checkpoints.newest_complete(list(self._context.attempts))
        if newest is not None:
            earlier = newest.parents[1] / "metrics.jsonl"
            if earlier != path and earlier.exists():
                shutil.copyfile(earlier, path)
        log = MetricsLog(path)
        log.rewind(checkpoints.step_of(newest) if newest else 0)
        self._rows = [] if not path.exists() else list(read_metrics(path))
        return Tracker(log, self._wandb(self._context.attempt))

    def _wandb(self, attempt: Path) -> WandbRun | None:
        tracking = self._context.tracking
        if tracking["mode"] == "disabled":
            return None
        return WandbRun(
            mode=cast(WandbMode, tracking["mode"]),
            project=tracking["project"] or "rlhf",
            entity=tracking["entity"],
            group=tracking["group"] or "rlhf",
            name=self._context.stage,
            attempt_key=self._context.key,
            folder=attempt,
            config=semantic_values(self._context.settings),
            warn=self._context.note,
        )
