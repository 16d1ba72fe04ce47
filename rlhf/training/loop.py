"""Run a training stage: the order of its rows, its learning rate, steps that resume, and its journal."""

import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf.attempt import liveness
from rlhf.attempt.context import Context
from rlhf.attempt.folder import AttemptFolder
from rlhf.config.base import semantic_values
from rlhf.errors import InterruptedRunError
from rlhf.randomness import stream
from rlhf.rollout.sequences import Sequences
from rlhf.tracking import MetricsLog, SinkThread, TrackedStage, finish, read_metrics, start_sinks
from rlhf.training import checkpoint_writer
from rlhf.training.limits import IterationLimit
from rlhf.zero import group


def learning_order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Return row numbers, batch after batch of one size, for all epochs: a function of these arguments alone.

    Each epoch has every row once, in an order of its own. Its last batch is filled up with rows of its first, here and
    not where batches are split among ranks. Rows of a batch are sorted by falling length, so that micro batches hold
    rows of similar length; which rows make a batch is random.

    lengths  of each row; at least one row
    epochs   above 0; a part of an epoch is its first batches
    """
    batches = -(-len(lengths) // batch_size)
    lengths_of = np.asarray(lengths)
    rows: list[int] = []
    for epoch in range(math.ceil(epochs)):
        order = np.resize(stream("learning order", seed, epoch).permutation(len(lengths)), (batches, batch_size))
        for batch in order:
            rows += batch[np.argsort(-lengths_of[batch], kind="stable")].tolist()
    return rows[: math.ceil(epochs * batches) * batch_size]


def learning_rate_share(
    done: int, total: int, schedule: Literal["linear", "cosine", "constant"], warmup_fraction: float = 0.0
) -> float:
    """Return the share in (0, 1] of the peak learning rate for update ``done``, counted from 0, of ``total``.

    It rises linearly over the first ``warmup_fraction`` of the updates and is above 0 in the first. Then it falls
    towards 0, which an update after the last would have: linearly, along half a cosine (Loshchilov and Hutter 2016,
    arXiv:1608.03983, eq. 5), or not at all.
    """
    warmup = math.ceil(warmup_fraction * total)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    progress = (done - warmup) / (total - warmup)
    match schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "constant":
            return 1.0


class Checkpointed(Protocol):
    """Something with state of its own between the steps of a loop."""

    def checkpoint_bytes(self) -> int:
        """Return about how many bytes all ranks together will write in :meth:`save`."""
        ...

    def save(self, checkpoint: Path) -> None:
        """Write the state into a checkpoint's folder. A collective."""
        ...

    def load(self, checkpoint: Path) -> None:
        """Read what :meth:`save` wrote. A collective."""
        ...


def resumable_steps(
    context: Context, total: int, checkpoint_every: int, state: Sequence[Checkpointed]
) -> Iterator[int]:
    """Yield 0 … total - 1, from the newest complete checkpoint on, and write one after every ``checkpoint_every``.

    Raises:
        DiskFullError: there is no room for a checkpoint; those before it stay.
        InterruptedRunError: the ranks were asked to stop, and have saved their current step.
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
    """Show that a step, numbered from 1, is finished; return whether to save it and stop. A collective."""
    liveness.beat(step)
    # Rank 0 looks for all: each might see the file at another step.
    return not group.all_true(not (group.is_main() and context.folder.stop.exists()))


def stopped(step: int) -> InterruptedRunError:
    """Return the error of a rank that has saved a step because it was asked to stop."""
    return InterruptedRunError(f"interrupted; saved at step {step}")


BINS = 64
"""Of a histogram."""
LOOKS = 8
"""About how often watched prompts are answered."""
TABLES = 20
"""About how many tables of samples a run sends to sinks."""


class Journal:
    """Metrics and progress of one stage, continued where the newest complete checkpoint ends.

    Metrics go to the file first, which must not fail, and then to sinks, which may.

    unit   the name of a step, for the user
    shown  metrics that the user sees as the stage runs
    limit  of the time that a step's samples take, for ``perf/of_limit``
    """

    def __init__(
        self,
        context: Context[Any],
        total: int,
        unit: str,
        shown: tuple[str, ...],
        limit: IterationLimit | None = None,
    ) -> None:
        self._context, self._total, self._unit, self._shown, self._limit = context, total, unit, shown, limit
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._alarms: set[str] = set()
        path = context.folder.metrics
        self._metrics_log: MetricsLog | None = None
        resumed_at = 0
        if group.is_main():
            resumed_at = _continue_files(context)
            self._metrics_log = MetricsLog(path)
        # Every rank judges a step by those before it, so all ranks must have them.
        self._rows: list[dict[str, Any]] = group.from_main(lambda: read_metrics(path) if path.exists() else [])
        self._sinks = _sinks(context, list(self._rows), resumed_at) if group.is_main() else []

    @contextmanager
    def timed(self, part: str) -> Generator[None]:
        """Count the time inside as ``time/<part>_s`` of the next logged step."""
        liveness.beat()
        start = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - start

    def log(self, step: int, metrics: Mapping[str, float], sequences: Sequences | None = None) -> None:
        """Report a finished step, numbered from 1. A collective.

        sequences  the samples of the step, for ``perf/tokens_per_s``, ``perf/of_limit`` and ``num_tokens``, the count
                   of response tokens until now
        """
        row = dict(metrics) | {f"time/{part}_s": seconds for part, seconds in self._seconds.items()}
        if sequences is not None:
            seconds = sum(self._seconds.values())
            tokens = int(sequences.mask.sum())
            row["perf/tokens_per_s"] = tokens / seconds
            row["num_tokens"] = tokens + next((r["num_tokens"] for r in reversed(self._rows) if "num_tokens" in r), 0)
            if self._limit is not None:
                row["perf/of_limit"] = self._limit.seconds(sequences) / seconds
        row |= gpu_memory()
        self._seconds.clear()
        self._rows.append(row)
        if self._metrics_log is not None:
            self._metrics_log.log(step, row)
            for sink in self._sinks:
                sink.log(step, row)
            shown = "  ".join(f"{name.split('/')[-1]} {row[name]:.3g}" for name in self._shown if name in row)
            self._context.progress(f"{self._unit} {step}/{self._total}  {shown}", step, self._total)

    def alarm(self, step: int, raised: Mapping[str, str]) -> None:
        """Show the user alarms by their names, each only the first time."""
        for name, line in raised.items():
            if self._metrics_log is not None and name not in self._alarms:
                self._alarms.add(name)
                self._context.note(line, alarm=name)
                for sink in self._sinks:
                    sink.alert(step, name, line)

    def watches(self, step: int) -> bool:
        """Return whether the prompts that people watch through a run are answered before a step's updates."""
        return (step - 1) % max(1, self._total // LOOKS) == 0

    def keep_watched(self, step: int, samples: Sequence[Mapping[str, Any]], *, finished: bool) -> None:
        """Write the answers to watched prompts beside the metrics.

        finished  they are of the policy after its last update
        """
        if self._metrics_log is not None:
            facts = {"step": step, "watched": True} | ({"finished": True} if finished else {})
            self._write_samples([{**facts, **sample} for sample in samples])

    def _write_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with self._context.folder.samples.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def keep_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write a step's samples beside the metrics."""
        if self._metrics_log is not None and samples:
            self._write_samples([{"step": step, **sample} for sample in samples])
            if step % max(1, self._total // TABLES) == 0 or step == self._total:
                for sink in self._sinks:
                    sink.samples(step, samples)

    def distributions(self, step: int, **values: Tensor) -> None:
        """Draw histograms of a step's finite values, by their names, where metrics are drawn."""
        if self._sinks:
            finite = {name: tensor[tensor.isfinite()].numpy() for name, tensor in values.items()}
            bins = {f"distribution/{name}": np.histogram(each, bins=BINS) for name, each in finite.items() if len(each)}
            drawn = {name: (counts.tolist(), edges.tolist()) for name, (counts, edges) in bins.items()}
            for sink in self._sinks:
                sink.distributions(step, drawn)

    def first_row(self, default: Mapping[str, float]) -> Mapping[str, float]:
        """Return the first step's metrics, or ``default`` before it is logged."""
        return self._rows[0] if self._rows else default

    def first(self, name: str) -> float:
        """Return a metric's first value, from before a resume too."""
        return next(row[name] for row in self._rows if name in row)

    def last(self, *names: str) -> dict[str, float]:
        """Return metrics' latest values."""
        return {name: next(row[name] for row in reversed(self._rows) if name in row) for name in names}

    def finish(self) -> None:
        """Close the sinks, within a bounded time; the file needs no closing."""
        finish(self._sinks)


def _continue_files(context: Context[Any]) -> int:
    """Take over the metrics and samples of the newest complete checkpoint's attempt, up to its step; return that."""
    folder, newest = context.folder, checkpoint_writer.newest_complete(list(context.attempts))
    earlier = AttemptFolder(newest.parents[1]) if newest else folder
    for source, target in ((earlier.metrics, folder.metrics), (earlier.samples, folder.samples)):
        if source != target and source.exists():
            shutil.copyfile(source, target)
    step = checkpoint_writer.step_of(newest) if newest else 0
    MetricsLog(folder.metrics).rewind(step)
    samples = folder.samples
    if samples.exists():
        # Lines of bytes: as text, a response may hold line ends of other alphabets.
        rows = samples.read_bytes().splitlines(keepends=True)
        # A row that a kill left half-written belongs to a step that is repeated.
        kept = [row for row in rows if row.endswith(b"\n") and json.loads(row)["step"] <= step]
        temporary = samples.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(samples)
    return step


def _sinks(context: Context[Any], history: Sequence[Mapping[str, Any]], resumed_at: int) -> list[SinkThread]:
    """Start the sinks that the pipeline names."""
    tracking = dict(context.tracking)
    names = tracking.pop("sinks", ())
    if not names:
        return []
    stage = TrackedStage(
        name=context.stage,
        key=context.key,
        attempt=context.attempt,
        config=semantic_values(context.settings),
        **tracking,
    )
    return start_sinks(names, stage, history, resumed_at, context.note)


def gpu_memory() -> dict[str, float]:
    """Return the most GPU memory that any rank took since the last call, 10^9 bytes; empty on a CPU. A collective.

    ``memory/peak_gb`` is that of tensors, ``memory/reserved_gb`` that of the allocator, which holds more.
    """
    if not torch.cuda.is_initialized():
        return {}
    taken = torch.tensor([torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()], dtype=torch.float64)
    torch.cuda.reset_peak_memory_stats()
    reserved, peak = (group.all_max(taken) / 1e9).tolist()
    return {"memory/reserved_gb": reserved, "memory/peak_gb": peak}
