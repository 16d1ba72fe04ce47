"""Steps and memory of dpo beside the hardware's limit: ``python -m benchmarks.dpo [--shape tiny|135m|1b] …``.

The stage dpo runs through its own code, as the only rank, in this process, on a Llama of random weights and pairs of
random responses of ``--response`` tokens to prompts of ``--prompt`` tokens. What no flag names has the default of the
settings file. A step lasts from one row of the metrics to the next; the first is not counted, nor is the reference,
which is measured before it. On a GPU the peak is put beside what was predicted.
"""

import argparse
from pathlib import Path

from benchmarks import steps
from benchmarks.limits import SHAPES
from benchmarks.ranks import parser, save_model
from benchmarks.rm import write_comparisons
from rlhf.config.stages import DpoSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.stages import dpo
from rlhf.training.limits import causal, forward


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, steps=4, prompt=None, response=None, batch_size=None, micro_batch=None)
    made.add_argument("--method", choices=("full", "lora"), default="full")
    made.add_argument("--activation-checkpointing", action="store_true")
    given = made.parse_args()
    given.responses = 2
    given.prompt = given.prompt or (64 if given.shape == "tiny" else 256)
    given.response = given.response or (16 if given.shape == "tiny" else 256)
    return given


def main() -> None:
    """Print the tables."""
    given = arguments()
    shape = SHAPES[given.shape]
    settings = steps.settings_of(
        DpoSettings,
        given,
        tuning=LoraTuning() if given.method == "lora" else FULL,
        max_length=given.prompt + given.response + 8,
        optimizer={"learning_rate": 1e-6},
        activation_checkpointing=given.activation_checkpointing,
    )

    def make(folder: Path) -> dict[str, Path]:
        policy = save_model(shape.config(settings.max_length), folder / "policy")
        rows = write_comparisons(folder / "rows", given, shape.vocabulary, given.steps * settings.batch_size)
        return {"policy": policy, "comparisons": rows["comparisons"]}

    found = steps.measure("dpo", dpo.run, given, settings, make)
    lengths = [given.prompt + given.response + 1] * 2 * settings.batch_size
    learned = 2 * settings.batch_size * (given.response + 1)
    work = forward(shape.sizes, sum(lengths), learned, causal(lengths))
    batch = f"{settings.batch_size} pairs of 2 x ({given.prompt} + {given.response}) tokens"
    steps.report(given, found, steps.limit_parts(shape, found.settings, work.operations), batch)


if __name__ == "__main__":
    main()
