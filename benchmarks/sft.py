"""Steps of sft beside the hardware's limit: ``python -m benchmarks.sft [--shape tiny|135m|1b|8b] …``.

The stage sft runs through its own code, as the only rank, in this process, on a Llama of random weights and
demonstrations of random words, packed into rows of ``--length`` tokens. Prompts have up to a quarter of that, and
completions up to a half. What no flag names has the default of the settings file. A step lasts from one row of
the metrics to the next; the first is not counted. Operations are those of real tokens, logits those of completions; the
data set's averages are taken for every step.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.limits import SHAPES, Shape, row_of, rows_of, table
from benchmarks.one_rank import (
    alone,
    announced,
    context_of,
    free_memory,
    in_words,
    largest,
    parser,
    publish,
    save_model,
    words,
)
from rlhf.config.stages import SftSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.stages import sft
from rlhf.tracking import read_metrics
from rlhf.training.limits import Part, Work, adamw, causal, ceilings, forward
from rlhf.zero import group


def write_demonstrations(folder: Path, vocabulary: int, length: int, tokens: int) -> list[tuple[int, int]]:
    """Write at least ``tokens`` tokens of demonstrations; return the lengths of prompts and completions with EOS."""
    folder.mkdir()
    generator, sizes, rows = np.random.default_rng(0), list[tuple[int, int]](), list[dict[str, str]]()
    while sum(map(sum, sizes)) < tokens:
        prompt, completion = (int(generator.integers(4, length // part)) for part in (4, 2))
        numbers = generator.integers(3, vocabulary, prompt + completion).tolist()
        rows.append({"prompt": words(numbers[:prompt]), "completion": f" {words(numbers[prompt:])}"})
        sizes.append((prompt, completion + 1))
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "heldout.jsonl").write_text(lines[0])
    return sizes


def limit_parts(shape: Shape, texts: Sequence[tuple[int, int]], tokens: float, settings: SftSettings) -> list[Part]:
    """Return what a step of ``tokens`` tokens must cost."""
    lengths = [prompt + completion for prompt, completion in texts]
    language = forward(shape.sizes, sum(lengths), sum(completion for _, completion in texts), causal(lengths))
    lora = isinstance(settings.tuning, LoraTuning)
    trained = shape.adapter(settings.tuning.rank) if isinstance(settings.tuning, LoraTuning) else shape.parameters
    operations = (2 if lora else 3) * language.operations * tokens / sum(lengths)
    return [
        Part("forward and backward", [Work(operations)]),
        Part("AdamW", [adamw(trained, settings.precision)]),
    ]


def settings_of(given: argparse.Namespace) -> SftSettings:
    """Return the stage's settings."""
    flags = {"batch_size": given.batch_size, "micro_batch_size": given.micro_batch}
    return SftSettings.model_validate(
        {name: value for name, value in flags.items() if value is not None}
        | {
            "tuning": LoraTuning() if given.method == "lora" else FULL,
            "precision": given.precision,
            "max_length": given.length,
            "optimizer": {"learning_rate": 1e-5},
            "checkpoint_every": 1_000_000,
            "activation_checkpointing": given.activation_checkpointing,
        }
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, steps=6, length=None, batch_size=None, micro_batch=None)
    made.add_argument("--method", choices=("full", "lora"), help="8b: lora; otherwise full")
    made.add_argument("--activation-checkpointing", action="store_true")
    given = made.parse_args()
    given.method = given.method or ("lora" if given.shape == "8b" else "full")
    given.length = given.length or (256 if given.shape == "tiny" else 1024)
    return given


def steps_of(metrics: Path) -> list[dict[str, Any]]:
    """Return seconds, real tokens and memory of each step behind the first."""
    rows = [row for row in read_metrics(metrics) if "num_tokens" in row]
    return [
        {
            "s": (datetime.fromisoformat(row["time"]) - datetime.fromisoformat(before["time"])).total_seconds(),
            "tokens": row["num_tokens"] - before["num_tokens"],
        }
        | {name: value for name, value in row.items() if name.startswith("memory/")}
        for before, row in pairwise(rows)
    ]


def main() -> None:
    """Print the tables."""
    given = arguments()
    shape, settings = SHAPES[given.shape], settings_of(given)
    with alone(given.scratch) as folder:
        settings = group.computable(context_of("sft", settings, {}, folder)).settings
        measured = ceilings(settings.precision, group.device())
        with announced("model and demonstrations made in"):
            inputs = {
                "base": save_model(shape.config(given.length), folder / "base"),
                "demonstrations": folder / "rows",
            }
            tokens = given.steps * settings.batch_size * given.length
            texts = write_demonstrations(inputs["demonstrations"], shape.vocabulary, given.length, tokens)
        free_memory()
        context = context_of("sft", settings, inputs, folder)
        with announced("the stage ran for"):
            sft.run(context)
        steps, chosen = steps_of(context.folder.metrics), context.folder.micro_batch.get()
    parts = limit_parts(shape, texts, mean(step["tokens"] for step in steps), settings)
    row, counted = row_of("step", [step["s"] for step in steps], parts, measured), rows_of(parts, measured)
    rate, memory = median(step["tokens"] / step["s"] for step in steps), largest(steps)
    micro = chosen["size"] if chosen else settings.micro_batch
    filled = mean(step["tokens"] for step in steps) / settings.batch_size / given.length
    lines = [
        f"{given.shape}, {given.method}, {settings.precision}, {settings.batch_size} packed rows of {given.length} "
        f"tokens, {filled:.1%} filled, micro_batch_size {micro}; {len(steps)} steps",
        f"{table([row])}\n\n{table(counted)}",
        f"real tokens/s: {rate:.4g}{in_words(memory)}",
    ]
    figures = {"precision": settings.precision, "step": row, "limit": counted, "tokens_per_s": rate, "memory": memory}
    publish(given, measured, "\n\n".join(lines), figures | {"steps": steps})


if __name__ == "__main__":
    main()
