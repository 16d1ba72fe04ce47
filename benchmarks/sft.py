"""Steps of sft beside the hardware's limit: ``python -m benchmarks.sft [--shape tiny|135m|1b|8b] …``.

The stage sft runs through its own code, as the only rank, in this process, on a Llama of random weights and
demonstrations of random words, packed into rows of ``--length`` tokens. Prompts have up to a quarter of that, and
completions up to a half. What no flag names has the default of the settings file. A step lasts from one row of
the metrics to the next; the first is not counted. Operations are those of real tokens, logits those of completions; the
data set's averages are taken for every step.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks import steps
from benchmarks.limits import SHAPES
from benchmarks.ranks import parser, save_model, words
from rlhf.config.stages import SftSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.stages import sft
from rlhf.training.limits import causal, forward


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


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, steps=6, length=None, batch_size=None, micro_batch=None)
    made.add_argument("--method", choices=("full", "lora"), help="8b: lora; otherwise full")
    made.add_argument("--activation-checkpointing", action="store_true")
    given = made.parse_args()
    given.method = given.method or ("lora" if given.shape == "8b" else "full")
    given.length = given.length or (256 if given.shape == "tiny" else 1024)
    return given


def main() -> None:
    """Print the tables."""
    given = arguments()
    shape = SHAPES[given.shape]
    settings = steps.settings_of(
        SftSettings,
        given,
        tuning=LoraTuning() if given.method == "lora" else FULL,
        max_length=given.length,
        optimizer={"learning_rate": 1e-5},
        activation_checkpointing=given.activation_checkpointing,
    )
    texts: list[tuple[int, int]] = []

    def make(folder: Path) -> dict[str, Path]:
        tokens = given.steps * settings.batch_size * given.length
        texts.extend(write_demonstrations(folder / "rows", shape.vocabulary, given.length, tokens))
        return {"base": save_model(shape.config(given.length), folder / "base"), "demonstrations": folder / "rows"}

    found = steps.measure("sft", sft.run, given, settings, make)
    lengths = [prompt + completion for prompt, completion in texts]
    work = forward(shape.sizes, sum(lengths), sum(completion for _, completion in texts), causal(lengths))
    operations = work.operations * found.tokens / sum(lengths)
    filled = found.tokens / settings.batch_size / given.length
    batch = f"{settings.batch_size} packed rows of {given.length} tokens, {filled:.1%} filled"
    steps.report(given, found, steps.limit_parts(shape, found.settings, operations), batch)


if __name__ == "__main__":
    main()
