"""The resumable loop of PPO's iterations, and the journal of a training stage."""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.base import semantic_values
from rlhf.errors import InterruptedRunError
from rlhf.tracking.metrics_log import MetricsLog, read_metrics
from rlhf.tracking.tracker import Tracker
from rlhf.tracking.wandb_run import WandbMode, WandbRun
from rlhf.training import checkpoint_writer
from rlhf.zero import group


class Checkpointed(Protocol):
    """What has state of its own between the steps of a loop."""

    def checkpoint_bytes(self) -> int:
        """About how many bytes all ranks together will write in :meth:`save`."""
        ...

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint's folder. A collective."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Go on from what :meth:`save` wrote. A collective."""
        ...


def resumable_steps(
    context: Context, total: int, checkpoint_every: int, state: Sequence[Checkpointed]
) -> Iterator[int]:
    """Count 0 … total - 1, from the newest complete checkpoint on, and write one after every ``checkpoint_every``.

    Raises:
        DiskFullError: there is no room for a checkpoint; those before it stay.
        InterruptedRunError: the ranks were asked to stop, and have saved the step that they were at.
    """
    newest = checkpoint_writer.checkpoint_to_resume(context)
    if newest is not None:
        for part in state:
            part.load(newest)
    for step in range(checkpoint_writer.step_of(newest) if newest else 0, total):
        yield step
        stopping = ends_here(context, step + 1)
        if stopping or ((step + 1) % checkpoint_every == 0 and step + 1 < total):
            estimate = sum(part.checkpoint_bytes() for part in state)
            with checkpoint_writer.writing(context, step + 1, estimate) as checkpoint:
                for part in state:
                    part.save(checkpoint)
        if stopping:
            raise stopped(step + 1)


def ends_here(context: Context[Any], step: int) -> bool:
    """Say that a step, numbered from 1, is finished; whether the ranks shall save it and stop. A collective."""
    liveness.beat(step)
    # Rank 0 looks for all: each might see the file at another step.
    return not group.all_true(not (group.is_main() and context.folder.stop.exists()))


def stopped(step: int) -> InterruptedRunError:
    """What a rank raises that has saved a step because it was asked to stop."""
    return InterruptedRunError(f"interrupted; saved at step {step}")


class Journal:
    """Metrics and progress of one stage, continued where the newest complete checkpoint ends.

    unit   what a step is called, for the user
    shown  metrics that the user sees as the stage runs
    """

    def __init__(self, context: Context[Any], total: int, unit: str, shown: tuple[str, ...]) -> None:
        self._context, self._total, self._unit, self._shown = context, total, unit, shown
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._alarms: set[str] = set()
        self._tracker = self._open() if group.is_main() else None
        # Every rank judges a step by those before it, so that all must know them.
        path = context.folder.metrics
        self._rows: list[dict[str, Any]] = group.from_main(lambda: read_metrics(path) if path.exists() else [])

    @contextmanager
    def timed(self, part: str) -> Generator[None]:
        """Count the time inside as ``time/<part>_s`` of the next logged step."""
        liveness.beat()
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def log(self, step: int, metrics: Mapping[str, float], tokens: int | None = None) -> None:
        """Report a finished step, numbered from 1. A collective.

        tokens  real response tokens of the step, for ``perf/tokens_per_s``
        """
        row = dict(metrics) | {f"time/{part}_s": seconds for part, seconds in self._seconds.items()}
        if tokens is not None:
            row["perf/tokens_per_s"] = tokens / sum(self._seconds.values())
        row |= gpu_memory()
        self._seconds.clear()
        self._rows.append(row)
        if self._tracker is not None:
            self._tracker.log(step, row)
            shown = "  ".join(f"{name.split('/')[-1]} {row[name]:.3g}" for name in self._shown if name in row)
            self._context.progress(f"{self._unit} {step}/{self._total}  {shown}", step, self._total)

    def alarm(self, raised: Mapping[str, str]) -> None:
        """Show the user alarms by their names, each only the first time."""
        for name, line in raised.items():
            if self._tracker is not None and name not in self._alarms:
                self._alarms.add(name)
                self._context.note(line)

    def keep_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write what the model said in a step beside the metrics."""
        if self._tracker is not None and samples:
            with self._context.folder.samples.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | dict(one), ensure_ascii=False) + "\n" for one in samples)

    def first_row(self, default: Mapping[str, float]) -> Mapping[str, float]:
        """The first step's metrics, or the given ones where this is the first."""
        return self._rows[0] if self._rows else default

    def first(self, name: str) -> float:
        """A metric's first value, from before a resume too."""
        return next(row[name] for row in self._rows if name in row)

    def last(self, *names: str) -> dict[str, float]:
        """Metrics' latest values."""
        return {name: next(row[name] for row in reversed(self._rows) if name in row) for name in names}

    def finish(self) -> None:
        """Close the sinks."""
        if self._tracker is not None:
            self._tracker.finish()

    def _open(self) -> Tracker:
        folder = self._context.folder
        newest = checkpoint_writer.newest_complete(list(self._context.attempts))
        earlier = AttemptFolder(newest.parents[1]) if newest else folder
        for source, target in ((earlier.metrics, folder.metrics), (earlier.samples, folder.samples)):
            if source != target and source.exists():
                shutil.copyfile(source, target)
        step = checkpoint_writer.step_of(newest) if newest else 0
        log = MetricsLog(folder.metrics)
        log.rewind(step)
        _rewind_samples(folder.samples, step)
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


def gpu_memory() -> dict[str, float]:
    """Return the memory that torch took on GPUs since the last call, of the rank that took most; empty on a CPU.

    A collective. ``memory/peak_gb`` is the most that tensors took, ``memory/reserved_gb`` the most that the allocator
    held for them, in 10^9 bytes.
    """
    if not torch.cuda.is_initialized():
        return {}
    taken = torch.tensor([torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()], dtype=torch.float64)
    torch.cuda.reset_peak_memory_stats()
    reserved, peak = (group.all_max(taken) / 1e9).tolist()
    return {"memory/reserved_gb": reserved, "memory/peak_gb": peak}


def _rewind_samples(path: Path, step: int) -> None:
    if path.exists():
        # Lines of bytes: as text, what a model wrote may hold line ends of other alphabets.
        rows = path.read_bytes().splitlines(keepends=True)
        # What a kill left half-written belongs to a step that is repeated.
        kept = [row for row in rows if row.endswith(b"\n") and json.loads(row)["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
