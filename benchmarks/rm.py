"""Steps of rm beside the hardware's limit: ``python -m benchmarks.rm [--shape tiny|135m|1b] [--apart] …``.

The stage rm runs through its own code, as the only rank, in this process, on a Llama of random weights, all of which
train, and lists of ``--responses`` random responses of ``--response`` tokens to a prompt of ``--prompt`` tokens. What
no flag names has the default of the settings file. A step lasts from one row of the metrics to the next; the first is
not counted. The limit counts each prompt once; tokens/s count it before each response, where ``--apart`` reads it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import steps
from benchmarks.limits import SHAPES
from benchmarks.ranks import parser, save_model, words
from rlhf.config.stages import RmSettings
from rlhf.models import shared_beginnings
from rlhf.stages import rm
from rlhf.training.limits import causal, forward


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


def main() -> None:
    """Print the tables."""
    given = arguments()
    if given.apart:
        shared_beginnings.FEWEST = 10**9
    shape = SHAPES[given.shape]
    settings = steps.settings_of(
        RmSettings,
        given,
        micro_batch_tokens=given.micro_tokens,
        max_length=given.prompt + given.response + 8,
        optimizer={"learning_rate": 1e-5},
    )

    def make(folder: Path) -> dict[str, Path]:
        base = save_model(shape.config(settings.max_length), folder / "base")
        lists = given.steps * settings.batch_size
        return {"base": base, **write_comparisons(folder / "rows", given, shape.vocabulary, lists)}

    found = steps.measure("rm", rm.run, given, settings, make)
    tokens, whole = given.prompt + given.responses * (given.response + 1), given.prompt + given.response + 1
    pairs = causal([given.prompt]) + given.responses * (causal([whole]) - causal([given.prompt]))
    work = forward(shape.sizes, settings.batch_size * tokens, 0, settings.batch_size * pairs)
    batch = (
        f"{settings.batch_size} lists of {given.responses} x ({given.prompt} + {given.response}) tokens, prompts "
        f"{'apart' if given.apart else 'shared'}"
    )
    steps.report(given, found, steps.limit_parts(shape, found.settings, work.operations), batch)


if __name__ == "__main__":
    main()
