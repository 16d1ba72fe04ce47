"""Steps and memory of dpo beside the hardware's limit: ``python -m benchmarks.dpo [--shape tiny|135m|1b] …``.

The stage dpo runs through its own code, as the only rank, in this process, on a Llama of random weights and pairs of
random responses of ``--response`` tokens to prompts of ``--prompt`` tokens. What no flag names has the default of the
settings file. A step lasts from one row of the metrics to the next; the first is not counted, nor is the reference,
which is measured before it. On a GPU the peak is put beside what was predicted.
"""

import argparse
from statistics import mean, median

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
)
from benchmarks.rm import write_comparisons
from benchmarks.sft import steps_of
from rlhf.config.stages import DpoSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.models.footprint import Architecture
from rlhf.pipeline.memory import predict
from rlhf.stages import dpo
from rlhf.training.limits import Part, Work, adamw, causal, ceilings, forward
from rlhf.zero import group


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


def settings_of(given: argparse.Namespace) -> DpoSettings:
    """Return the stage's settings."""
    flags = {"batch_size": given.batch_size, "micro_batch_size": given.micro_batch}
    return DpoSettings.model_validate(
        {name: value for name, value in flags.items() if value is not None}
        | {
            "tuning": LoraTuning() if given.method == "lora" else FULL,
            "precision": given.precision,
            "max_length": given.prompt + given.response + 8,
            "optimizer": {"learning_rate": 1e-6},
            "checkpoint_every": 1_000_000,
            "activation_checkpointing": given.activation_checkpointing,
        }
    )


def limit_parts(shape: Shape, given: argparse.Namespace, settings: DpoSettings) -> list[Part]:
    """Return what a step must cost."""
    lengths = [given.prompt + given.response + 1] * 2 * settings.batch_size
    learned = 2 * settings.batch_size * (given.response + 1)
    work = forward(shape.sizes, sum(lengths), learned, causal(lengths))
    lora = isinstance(settings.tuning, LoraTuning)
    trained = shape.adapter(settings.tuning.rank) if isinstance(settings.tuning, LoraTuning) else shape.parameters
    return [
        Part("forward and backward", [Work((2 if lora else 3) * work.operations)]),
        Part("AdamW", [adamw(trained, settings.precision)]),
    ]


def main() -> None:
    """Print the tables."""
    given = arguments()
    shape, settings = SHAPES[given.shape], settings_of(given)
    with alone(given.scratch) as folder:
        settings = group.computable(context_of("dpo", settings, {}, folder)).settings
        measured = ceilings(settings.precision, group.device())
        with announced("model and comparisons made in"):
            policy = save_model(shape.config(settings.max_length), folder / "policy")
            rows = write_comparisons(folder / "rows", given, shape.vocabulary, given.steps * settings.batch_size)
        free_memory()
        context = context_of("dpo", settings, {"policy": policy, "comparisons": rows["comparisons"]}, folder)
        with announced("the stage ran for"):
            dpo.run(context)
        steps, chosen = steps_of(context.folder.metrics), context.folder.micro_batch.get()
        size = chosen["size"] if chosen else settings.micro_batch
        settings = settings.model_copy(update={"micro_batch_size": size})
        predicted = predict(settings, {"policy": Architecture.of(policy)}, gpu=group.device().type == "cuda")
    parts = limit_parts(shape, given, settings)
    row, counted = row_of("step", [step["s"] for step in steps], parts, measured), rows_of(parts, measured)
    rate, memory = median(step["tokens"] / step["s"] for step in steps), largest(steps)
    lines = [
        f"{given.shape}, {given.method}, {settings.precision}, {settings.batch_size} pairs of 2 x ({given.prompt} + "
        f"{given.response}) tokens, micro_batch_size {size}; {len(steps)} steps of "
        f"{mean(step['tokens'] for step in steps):.0f} tokens",
        f"{table([row])}\n\n{table(counted)}",
        f"tokens/s: {rate:.4g}{in_words(memory)}",
        f"predicted: {predicted}",
    ]
    publish(given, measured, "\n\n".join(lines), {"step": row, "limit": counted, "tokens_per_s": rate, "steps": steps})


if __name__ == "__main__":
    main()
