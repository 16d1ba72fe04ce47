"""Steps of rm beside the hardware's limit: ``python -m benchmarks.rm [--shape tiny|135m|1b] [--apart] …``.

The stage rm runs through its own code, as the only rank, in this process, on a Llama of random weights, all of which
train, and lists of ``--responses`` random responses of ``--response`` tokens to a prompt of ``--prompt`` tokens. What
no flag names has the default of the settings file. A step lasts from one row of the metrics to the next; the first is
not counted. The limit counts each prompt once; ``--apart`` reads it before each response.
"""

import argparse
import json
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
from benchmarks.sft import steps_of
from rlhf.config.stages import RmSettings
from rlhf.models import shared_beginnings
from rlhf.stages import rm
from rlhf.training.limits import Part, Work, adamw, causal, ceilings, forward
from rlhf.zero import group


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = parser(
        __doc__, steps=4, prompt=None, response=None, responses=4, batch_size=None, micro_batch=None, micro_tokens=None
    )
    made.add_argument("--apart", action="store_true", help="read a prompt before each of its responses")
    given = made.parse_args()
    given.prompt = given.prompt or (64 if given.shape == "tiny" else 256)
    given.response = given.response or (16 if given.shape == "tiny" else 64)
    return given


def settings_of(given: argparse.Namespace) -> RmSettings:
    """Return the stage's settings."""
    flags = {
        "batch_size": given.batch_size,
        "micro_batch_size": given.micro_batch,
        "micro_batch_tokens": given.micro_tokens,
    }
    return RmSettings.model_validate(
        {name: value for name, value in flags.items() if value is not None}
        | {
            "precision": given.precision,
            "max_length": given.prompt + given.response + 8,
            "optimizer": {"learning_rate": 1e-5},
            "checkpoint_every": 1_000_000,
        }
    )


def write_comparisons(folder: Path, given: argparse.Namespace, vocabulary: int, lists: int) -> dict[str, Path]:
    """Write lists of comparisons, and demonstrations for the normaliser."""
    draw = np.random.default_rng(0)

    def text(length: int) -> str:
        return words(draw.integers(3, vocabulary, length).tolist())

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for part, count in (("train", lists), ("heldout", 2)):
        rows = [{"prompt": text(given.prompt), "pool": number} for number in range(count)]
        lists_of = [[f" {text(given.response)}" for _ in range(given.responses)] for _ in rows]
        strengths = [float(number) for number in range(given.responses)]
        pairs = zip(rows, lists_of, strict=True)
        write(f"comparisons/{part}.jsonl", [row | {"responses": own, "strengths": strengths} for row, own in pairs])
    shown = [{"prompt": text(given.prompt), "completion": f" {text(given.response)}"} for _ in range(4)]
    write("demonstrations/train.jsonl", shown)
    return {role: folder / role for role in ("comparisons", "demonstrations")}


def limit_parts(shape: Shape, given: argparse.Namespace, settings: RmSettings) -> list[Part]:
    """Return what a step must cost."""
    tokens = given.prompt + given.responses * (given.response + 1)
    pairs = causal([given.prompt]) + given.responses * (
        causal([given.prompt + given.response + 1]) - causal([given.prompt])
    )
    work = forward(shape.sizes, settings.batch_size * tokens, 0, settings.batch_size * pairs)
    return [
        Part("forward and backward", [Work(3 * work.operations)]),
        Part("AdamW", [adamw(shape.parameters, settings.precision)]),
    ]


def main() -> None:
    """Print the tables."""
    given = arguments()
    if given.apart:
        shared_beginnings.FEWEST = 10**9
    shape, settings = SHAPES[given.shape], settings_of(given)
    with alone(given.scratch) as folder:
        settings = group.computable(context_of("rm", settings, {}, folder)).settings
        measured = ceilings(settings.precision, group.device())
        with announced("model and comparisons made in"):
            inputs = {"base": save_model(shape.config(settings.max_length), folder / "base")}
            inputs |= write_comparisons(folder / "rows", given, shape.vocabulary, given.steps * settings.batch_size)
        free_memory()
        context = context_of("rm", settings, inputs, folder)
        with announced("the stage ran for"):
            rm.run(context)
        steps, chosen = steps_of(context.folder.metrics), context.folder.micro_batch.get()
    parts = limit_parts(shape, given, settings)
    row, counted = row_of("step", [step["s"] for step in steps], parts, measured), rows_of(parts, measured)
    rate, memory = median(step["tokens"] / step["s"] for step in steps), largest(steps)
    micro = f"micro_batch_size {chosen['size'] if chosen else settings.micro_batch}"
    if settings.micro_batch_tokens is not None:
        micro = f"micro_batch_tokens {settings.micro_batch_tokens}"
    lines = [
        f"{given.shape}, {settings.precision}, {settings.batch_size} lists of {given.responses} x ({given.prompt} + "
        f"{given.response}) tokens, prompts {'apart' if given.apart else 'shared'}, {micro}; {len(steps)} steps of "
        f"{mean(step['tokens'] for step in steps):.0f} tokens",
        f"{table([row])}\n\n{table(counted)}",
        f"tokens/s, prompts counted for each response: {rate:.4g}{in_words(memory)}",
    ]
    publish(given, measured, "\n\n".join(lines), {"step": row, "limit": counted, "tokens_per_s": rate, "steps": steps})


if __name__ == "__main__":
    main()
