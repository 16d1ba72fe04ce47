"""Steps of a stage that TRL trains beside the hardware's limit: what the benchmarks of sft, rm and dpo share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, Generic, TypeVar

from benchmarks.limits import Shape, row_of, rows_of, table
from benchmarks.ranks import alone, announced, context_of, free_memory, in_words, largest, publish
from rlhf.attempt.context import Context
from rlhf.config.stages import DpoSettings, RmSettings, SftSettings
from rlhf.config.tuning import LoraTuning
from rlhf.pipeline.fitting import architectures
from rlhf.pipeline.memory import Prediction, predict
from rlhf.tracking import read_metrics
from rlhf.training.limits import Ceilings, Part, Work, adamw, ceilings
from rlhf.zero import group

S = TypeVar("S", SftSettings, RmSettings, DpoSettings)


@dataclass(frozen=True)
class Measured(Generic[S]):
    """What a run of a stage showed."""

    settings: S
    """With the micro batch that was chosen."""
    ceilings: Ceilings
    steps: Sequence[Mapping[str, Any]]
    """Seconds, real tokens and memory of each step behind the first."""
    predicted: Prediction | None
    """The peak of its memory."""

    @property
    def tokens(self) -> float:
        """Return the mean of a step's real tokens."""
        return mean(step["tokens"] for step in self.steps)


def settings_of(kind: type[S], given: argparse.Namespace, **more: Any) -> S:
    """Return a stage's settings with the command line's; what is None has its default."""
    values = {
        "batch_size": given.batch_size,
        "micro_batch_size": given.micro_batch,
        "precision": given.precision,
        "checkpoint_every": 1_000_000,
    }
    return kind.model_validate({name: value for name, value in (values | more).items() if value is not None})


def measure(
    stage: str,
    run: Callable[[Context[S]], Any],
    given: argparse.Namespace,
    settings: S,
    make: Callable[[Path], Mapping[str, Path]],
) -> Measured[S]:
    """Run a stage through its own code, as the only rank, in this process.

    make  writes the stage's inputs into a folder
    """
    with alone(given.scratch) as folder:
        settings = group.computable(context_of(stage, settings, {}, folder)).settings
        measured = ceilings(settings.precision, group.device())
        with announced("inputs made in"):
            inputs = make(folder)
        free_memory()
        context = context_of(stage, settings, inputs, folder)
        with announced("the stage ran for"):
            run(context)
        steps, chosen = _steps(context.folder.metrics), context.folder.micro_batch.get()
        if chosen:
            settings = settings.model_copy(update={"micro_batch_size": chosen["size"]})
        models = architectures(inputs)
        predicted = predict(settings, models, gpu=group.device().type == "cuda") if models else None
    return Measured(settings, measured, steps, predicted)


def _steps(metrics: Path) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(metrics) if "num_tokens" in row]
    return [
        {
            "s": (datetime.fromisoformat(row["time"]) - datetime.fromisoformat(before["time"])).total_seconds(),
            "tokens": row["num_tokens"] - before["num_tokens"],
        }
        | {name: value for name, value in row.items() if name.startswith("memory/")}
        for before, row in pairwise(rows)
    ]


def limit_parts(shape: Shape, settings: S, operations: float) -> list[Part]:
    """Return what a step must cost whose forward pass takes so many operations."""
    tuning = settings.tuning
    # With an adapter, gradients of the weights under it are not computed.
    passes, trained = (2, shape.adapter(tuning.rank)) if isinstance(tuning, LoraTuning) else (3, shape.parameters)
    return [
        Part("forward and backward", [Work(passes * operations)]),
        Part("AdamW", [adamw(trained, settings.precision)]),
    ]


def report(given: argparse.Namespace, found: Measured[S], parts: Sequence[Part], batch: str) -> None:
    """Print the tables, and write the figures as JSON where that is asked for.

    batch  in words, what a step learns from
    """
    settings, steps = found.settings, found.steps
    row, counted = row_of("step", [step["s"] for step in steps], parts, found.ceilings), rows_of(parts, found.ceilings)
    rate, memory = median(step["tokens"] / step["s"] for step in steps), largest(steps)
    micro = f"micro_batch_size {settings.micro_batch}"
    if settings.micro_batch_tokens is not None:
        micro = f"micro_batch_tokens {settings.micro_batch_tokens}"
    lines = [
        f"{given.shape}, {settings.tuning.method}, {settings.precision}, {batch}, {micro}; {len(steps)} steps of "
        f"{found.tokens:.0f} tokens",
        f"{table([row])}\n\n{table(counted)}",
        f"tokens/s: {rate:.4g}{in_words(memory)}",
        f"predicted: {found.predicted}",
    ]
    figures = {"precision": settings.precision, "step": row, "limit": counted, "tokens_per_s": rate, "memory": memory}
    publish(given, found.ceilings, "\n\n".join(lines), figures | {"steps": steps})
