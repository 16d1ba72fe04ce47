"""Generation beside the hardware's limit: ``python -m benchmarks.rollout [--shape tiny|135m|1b|8b] …``.

The product's generator answers prompts with a Llama of random weights. Of the rounds the first is not counted. Lengths
are forced as in :mod:`benchmarks.ppo`: all of ``--response``, and spread evenly from 32 to twice that; the last line
compares the tokens a second of both, and those that the limits of both allow: the last rows of a batch read all
weights for few tokens. Random numbers are drawn, and prompts tokenised, before the clock starts.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import SHAPES, row_of, rows_of, table
from benchmarks.ranks import (
    add_engine,
    alone,
    announced,
    context_of,
    drawn_lengths,
    fill_in,
    force_lengths,
    free_memory,
    in_words,
    largest,
    longest,
    parser,
    publish,
    save_model,
    sizes,
    write_prompts,
)
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import Precision
from rlhf.models import folders
from rlhf.rollout.drawing import uniforms
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import Generator
from rlhf.rollout.vllm_sampling import Room, VllmSampler
from rlhf.training.limits import Ceilings, Part, ceilings, decode, prefill, synchronise
from rlhf.training.loop import gpu_memory
from rlhf.zero import group
from rlhf.zero.engine import DTYPES


def measured_rounds(
    given: argparse.Namespace, precision: Precision, folder: Path, lengths: Sequence[int]
) -> list[dict[str, float]]:
    """Sample ``given.rounds`` times; return seconds and memory of all but the first."""
    fp32_head = not given.bf16_head
    if given.engine == "vllm":
        policy = folders.load_policy(folder / "base", DTYPES[precision], fp32_head=fp32_head).to(group.device()).eval()
        room = Room(given.rollouts, given.prompt + longest(given.lengths, given.response))
        generator = VllmSampler(folder / "base", precision, 1.0, room, fp32_head=fp32_head, source=policy)
    else:
        at_once = given.at_once or given.rollouts
        generator = Generator(folder / "base", precision, 1.0, at_once, fp32_head=fp32_head)
    force_lengths(generator, lengths)
    prompts = PromptStream(folder / "prompts" / "train.jsonl", generator.tokenizer, given.prompt)
    rounds: list[dict[str, float]] = []
    for number in range(given.rounds):
        batch = prompts.batch(number, given.rollouts)
        noise = uniforms(0, batch.samples, longest(given.lengths, given.response))
        synchronise(group.device())
        start = time.perf_counter()
        generator.sample(batch.ids, noise)
        rounds.append({"s": time.perf_counter() - start} | gpu_memory())
    return rounds[1:]


def measure(
    given: argparse.Namespace, precision: Precision, folder: Path, measured: Ceilings
) -> tuple[str, dict[str, Any]]:
    """Return text and figures of one way of drawing lengths."""
    lengths = drawn_lengths(given.lengths, given.response, given.rollouts)
    free_memory()
    rounds = measured_rounds(given, precision, folder, lengths)
    model, width = SHAPES[given.shape].sizes, 2 if precision == "bf16" else 4
    prompts = [given.prompt] * len(lengths)
    parts = [
        Part("prefill", [prefill(model, prompts, width)]),
        Part("decode", decode(model, prompts, lengths, width)),
    ]
    row = row_of("rollout", [one["s"] for one in rounds], parts, measured)
    limit, rate, memory = rows_of(parts, measured), sum(lengths) / row["s"], largest(rounds)
    words = f"{sizes(given, precision, lengths)}, sampled by {given.engine}; {len(rounds)} rounds"
    text = f"{words}\n\n{table([row])}\n\n{table(limit)}\n\nresponse tokens/s: {rate:.4g}{in_words(memory)}"
    figures = {"rollout": row, "limit": limit, "tokens_per_s": rate, "limit_per_s": sum(lengths) / row["limit, s"]}
    return text, figures | {"memory": memory, "lengths": lengths, "rounds": rounds}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    made = parser(__doc__, rollouts=None, prompt=None, response=None, rounds=4, at_once=None)
    add_engine(made)
    made.add_argument("--lengths", choices=("uniform", "spread", "both"), default="both", help="of responses")
    given = made.parse_args()
    if given.rounds < 2:
        made.error("--rounds must be 2 or more: the first is not counted")
    fill_in(given, rollouts=16, prompt=64, response=64)
    return given


def main() -> None:
    """Print the tables."""
    given = arguments()
    kinds = ("uniform", "spread") if given.lengths == "both" else (given.lengths,)
    shape, figures, texts = SHAPES[given.shape], dict[str, Any](), list[str]()
    with alone(given.scratch) as folder:
        settings = PpoSettings(precision=given.precision)
        precision = group.computable(context_of("rollout", settings, {}, folder)).settings.precision
        measured = ceilings(precision, group.device())
        with announced("model made in"):
            save_model(shape.config(given.prompt + 2 * given.response), folder / "base")
            write_prompts(folder / "prompts", shape.vocabulary, given.prompt, given.rollouts * given.rounds)
        for kind in kinds:
            one = argparse.Namespace(**vars(given) | {"lengths": kind})
            text, figures[kind] = measure(one, precision, folder, measured)
            texts.append(text)
    if len(kinds) == 2:
        share, allowed = (
            figures["spread"][rate] / figures["uniform"][rate] for rate in ("tokens_per_s", "limit_per_s")
        )
        texts.append(f"tokens/s with spread lengths are {share:.0%} of those with uniform ones; limits: {allowed:.0%}")
    publish(given, measured, "\n\n".join(texts), {"precision": precision} | figures)


if __name__ == "__main__":
    main()
