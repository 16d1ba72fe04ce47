"""One iteration of PPO, or GRPO, beside the hardware's limit: ``python -m benchmarks.ppo [--shape tiny|135m|1b] …``.

The stage ppo (or ``--stage grpo``) runs through its own code, on Llamas of random weights, in this process as the only
rank, or on ``--ranks`` GPUs of this machine, whose limit is that of each rank's share; the reward model has the
policy's shape. Of the iterations the first is not counted; of the others the tables have the median and the range.
Rollout, score and train are the stage's own ``time/…_s``; other is the rest of the iteration. What the limit counts is
in :mod:`rlhf.training.limits`.

8b is one base with LoRA adapters (``share_base``). Prompts all have ``--prompt`` tokens. Responses have the length
``--response``, or with ``--lengths spread`` lengths from 32 to twice that. Random weights would end them anywhere:
the benchmark changes the random numbers that the policy samples with (``ranks.with_lengths``), and nothing else.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.limits import SHAPES, row_of, rows_of, table
from benchmarks.ranks import (
    NORMALISER,
    add_engine,
    announced,
    context_of,
    drawn_lengths,
    fill_in,
    force_lengths,
    free_memory,
    in_group,
    in_words,
    largest,
    longest,
    parser,
    publish,
    save_adapter,
    save_model,
    sizes,
    write_prompts,
)
from rlhf.attempt.context import Context
from rlhf.config.grpo import GrpoSettings
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.tuning import FULL, LoraTuning
from rlhf.pipeline.fitting import architectures
from rlhf.rollout.prompts import PromptStream
from rlhf.stages import grpo, ppo
from rlhf.tracking import read_metrics
from rlhf.training.limits import Ceilings, IterationModels, Part, ceilings, synchronise
from rlhf.training.loading import load_models, load_policy_and_scoring, with_micro_batch
from rlhf.training.loop import Journal
from rlhf.training.policy import KlCoefficient
from rlhf.zero import group

TIMED = ("rollout", "score", "train")
SETTINGS: dict[str, type[PpoSettings | GrpoSettings]] = {"ppo": PpoSettings, "grpo": GrpoSettings}


def saved_inputs(given: argparse.Namespace, folder: Path, response: int) -> dict[str, Path]:
    """Write what ppo takes: policy, reward model and prompts, no prompt twice."""
    # The reward model reads an EOS behind each response.
    context = given.prompt + response + 1
    shape, normaliser = SHAPES[given.shape], NORMALISER | {"score_max_length": context}
    config = shape.config(context)
    prompts = write_prompts(folder / "prompts", shape.vocabulary, given.prompt, given.rollouts * given.iterations)
    base = save_model(config, folder / "base")
    if given.shape != "8b":
        reward = save_model(config, folder / "reward", scores=True, normaliser=normaliser)
        return {"policy": base, "reward": reward, "prompts": prompts}
    policy = save_adapter(config, base, folder / "policy", LoraTuning(), scores=False)
    reward = save_adapter(config, base, folder / "reward", LoraTuning(), scores=True, normaliser=normaliser)
    return {"policy": policy, "reward": reward, "prompts": prompts}


def settings_of(given: argparse.Namespace, response: int) -> PpoSettings | GrpoSettings:
    """Return the stage's settings; what no flag names has the default of the settings file."""
    flags: dict[str, Any] = {"packing": False} if given.padded else {}
    if given.micro_batch is not None:
        flags["micro_batch_size"] = given.micro_batch
    if given.micro_batch_tokens is not None:
        flags["micro_batch_tokens"] = given.micro_batch_tokens
    if given.stage == "ppo":
        flags |= {"share_base": given.shape == "8b", "value_learning_rate": 1e-6}
    return SETTINGS[given.stage].model_validate(
        flags
        | {
            "tuning": LoraTuning() if given.method == "lora" else FULL,
            "precision": given.precision,
            "iterations": given.iterations,
            "rollouts": given.rollouts,
            "epochs": given.epochs,
            "minibatches": given.minibatches,
            "sampling": {"max_new_tokens": response, "fp32_head": not given.bf16_head},
            "rollout": {"engine": given.engine},
            "max_prompt_length": given.prompt,
            "activation_checkpointing": given.activation_checkpointing,
            "workers": {"count": given.ranks},
            "zero": {"stage": given.zero_stage},
            # No watched prompts: their answers' lengths are not drawn.
            "samples_kept": 0,
            # Small, so that the weights stay as good as random.
            "policy_learning_rate": 1e-6,
        }
    )


def loaded(context: Context[Any]) -> tuple[tuple[Any, ...], Callable[..., None]]:
    """Load a stage's models, the policy first; return them, and what runs one of its iterations."""
    if isinstance(context.settings, GrpoSettings):
        return load_policy_and_scoring(context), grpo.iterate
    return load_models(context), ppo.iterate


def measured_iterations(context: Context[PolicyGradientSettings], lengths: Sequence[int]) -> list[dict[str, float]]:
    """Run the stage's iterations; on the first rank return the metrics of all but the
    first, with ``time/all_s``.
    """
    settings = context.settings
    with announced("models loaded in"):
        models, iterate = loaded(context)
    force_lengths(models[0], lengths)
    prompts = PromptStream(context.inputs["prompts"] / "train.jsonl", models[0].tokenizer, settings.max_prompt_length)
    journal, kl = Journal(context, settings.iterations, unit="iteration", shown=()), KlCoefficient(settings.kl)
    times: list[float] = []
    for iteration in range(settings.iterations):
        synchronise(group.device())
        start = time.perf_counter()
        iterate(iteration, settings, models, prompts, None, kl, journal)
        synchronise(group.device())
        times.append(time.perf_counter() - start)
        if group.is_main():
            print(f"iteration {iteration + 1}/{settings.iterations}: {times[-1]:.2f} s", flush=True)
    if not group.is_main():
        return []
    rows = read_metrics(context.folder.metrics)
    return [row | {"time/all_s": seconds} for row, seconds in zip(rows, times, strict=True)][1:]


def compared(
    rows: Sequence[dict[str, float]], parts: dict[str, list[Part]], measured: Ceilings
) -> list[dict[str, Any]]:
    """Return the rows of the table: rollout, score, train, other and the whole beside their limits."""
    seconds = {name: [row[f"time/{name}_s"] for row in rows] for name in TIMED}
    whole = [row["time/all_s"] for row in rows]
    other = [total - sum(row[f"time/{name}_s"] for name in TIMED) for total, row in zip(whole, rows, strict=True)]
    return [
        *(row_of(name, seconds[name], parts[name], measured) for name in TIMED),
        row_of("other", other, [], measured),
        row_of("whole", whole, [part for name in TIMED for part in parts[name]], measured),
    ]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    sizes = {"rollouts": None, "prompt": None, "response": None, "epochs": 1, "minibatches": 1, "iterations": 4}
    made = parser(__doc__, **sizes, ranks=1, micro_batch=None, micro_batch_tokens=None)
    add_engine(made)
    made.add_argument("--stage", choices=tuple(SETTINGS), default="ppo", help="8b: ppo, and nothing else")
    made.add_argument("--lengths", choices=("uniform", "spread"), default="uniform", help="of responses")
    made.add_argument("--method", choices=("full", "lora"), help="8b: lora, and nothing else; otherwise full")
    made.add_argument("--activation-checkpointing", action="store_true")
    made.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=3, help="what several ranks share out")
    made.add_argument("--padded", action="store_true", help="samples, where they would be packed")
    given = made.parse_args()
    given.method = given.method or ("lora" if given.shape == "8b" else "full")
    if given.shape == "8b" and given.method == "full":
        made.error("--shape 8b is one base with adapters: leave --method out")
    if given.iterations < 2:
        made.error("--iterations must be 2 or more: the first is not counted")
    fill_in(given, rollouts=16, prompt=64, response=64)
    if given.rollouts % given.ranks:
        made.error("--ranks must divide --rollouts")
    return given


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Print the tables, as the first rank of a group or one of the others, which print nothing."""
    response = longest(given.lengths, given.response)
    lengths = drawn_lengths(given.lengths, given.response, given.rollouts)
    mine = [lengths[row] for row in group.my_rows(given.rollouts).tolist()]
    settings = settings_of(given, response)
    context = group.computable(context_of(given.stage, settings, {}, folder))
    measured = ceilings(context.settings.precision, group.device())
    with announced("models made in"):
        inputs = group.from_main(lambda: saved_inputs(given, folder, response))
    free_memory()
    context = with_micro_batch(context_of(given.stage, context.settings, inputs, folder))
    models = architectures(inputs)
    assert models is not None
    rows = measured_iterations(context, lengths)
    if not group.is_main():
        return
    limit = IterationModels.of(context.settings, models)
    parts = limit.parts(context.settings, [given.prompt] * len(mine), mine, given.ranks)
    counted = rows_of([part for name in TIMED for part in parts[name]], measured)
    times, memory = compared(rows, parts, measured), largest(rows)
    rates = {name: sum(lengths) / median(row[f"time/{name}_s"] for row in rows) for name in ("rollout", "all")}
    lines = [
        f"{sizes(given, context.settings.precision, lengths)}, {given.method}, {given.epochs} x {given.minibatches} "
        f"updates, micro_batch_size {context.settings.micro_batch}, "
        f"{'packed' if context.settings.packing else 'padded'}, sampled by {given.engine}; ranks {given.ranks}, "
        f"ZeRO stage {given.zero_stage}; {len(rows)} iterations",
        table(times),
        f"response tokens/s: {rates['all']:.4g} over the iteration, {rates['rollout']:.4g} over the rollout"
        + in_words(memory),
        f"what the limit counts, an iteration:\n\n{table(counted)}",
    ]
    figures = {"precision": context.settings.precision, "parts": times, "limit": counted, "tokens_per_s": rates}
    figures |= {"memory": memory, "lengths": lengths, "iterations": rows}
    publish(given, measured, "\n\n".join(lines), figures)


def main() -> None:
    """Start the ranks."""
    in_group(arguments(), measure)


if __name__ == "__main__":
    main()
