"""Rollouts of a sharded policy over several ranks: ``python -m benchmarks.split_rollout [--shape 8b] [--ranks 2] …``.

Each way of holding copies is measured in turn, ``--tensor-parallel 1 2 gathered``: a whole copy on each rank, one that
so many ranks hold together, none. A Llama of random weights in shards of ZeRO-3 answers prompts with responses of one
length. The columns: seconds in which the weights are handed over from the shards, seconds of a rollout without that,
response tokens a second of all ranks with both, and on GPUs the most memory of a rank, 10^9 bytes. Of the rounds the
first is not counted; the others' medians are shown.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.limits import SHAPES
from benchmarks.ranks import (
    announced,
    context_of,
    fill_in,
    force_lengths,
    free_memory,
    in_group,
    parser,
    save_model,
    write_prompts,
)
from rlhf.config.ppo import PpoSettings
from rlhf.models import folders
from rlhf.models.heads import TokenLogprobs
from rlhf.rollout.drawing import uniforms
from rlhf.rollout.prompts import PromptStream
from rlhf.rollout.rollout import Generator, Sampler
from rlhf.rollout.split import GatheredSampler, SplitGenerator
from rlhf.training.limits import synchronise
from rlhf.training.loop import gpu_memory
from rlhf.zero import group
from rlhf.zero.engine import DTYPES, Engine, sharded_loading

Together = int | Literal["gathered"]
COLUMNS = "tensor_parallel", "hand-over, s", "rollout, s", "tokens/s", "peak, GB"


def measured(given: argparse.Namespace, folder: Path, precision: Any, together: Together) -> tuple[Any, ...]:
    """Return a row of the table. A collective."""
    with sharded_loading(precision):
        model = folders.load_policy(folder / "base", DTYPES[precision])
    base, sampler = folder / "base", None
    if together not in (1, "gathered"):
        sampler = SplitGenerator(base, model, precision, 1.0, given.rollouts, together)
    engine = Engine(TokenLogprobs(model), precision)
    if together == "gathered":
        sampler = GatheredSampler(base, engine.module, model, 1.0, given.rollouts)
    sampler = sampler or Generator(base, precision, 1.0, given.rollouts, source=model)
    force_lengths(sampler, [given.response] * given.rollouts)
    prompts = PromptStream(folder / "prompts" / "train.jsonl", sampler.tokenizer, given.prompt)
    free_memory()
    rounds = [one_round(given, sampler, prompts, number) for number in range(given.rounds)][1:]
    over, rollout = (statistics.median(times) for times in zip(*rounds, strict=True))
    memory = torch.tensor(gpu_memory().get("memory/peak_gb", 0.0))
    tokens = given.rollouts * given.response / (over + rollout)
    return together, f"{over:.3f}", f"{rollout:.2f}", f"{tokens:.4g}", f"{float(group.all_max(memory)):.1f}"


def one_round(given: argparse.Namespace, sampler: Sampler, prompts: PromptStream, number: int) -> tuple[float, float]:
    """Return the seconds of handing weights over, and of a rollout without that. A collective."""
    batch = prompts.batch(number, given.rollouts)
    noise = uniforms(0, batch.samples, given.response)
    over = timed(torch.no_grad()(sampler.take_weights))
    return over, timed(lambda: sampler.sample(batch.ids, noise)) - over


def timed(act: Callable[[], Any]) -> float:
    """Return the seconds that all ranks take for an act."""
    synchronise(group.device())
    group.barrier()
    start = time.perf_counter()
    act()
    synchronise(group.device())
    group.barrier()
    return time.perf_counter() - start


def measure(given: argparse.Namespace, folder: Path) -> None:
    """Measure each way in turn, as a rank; the first prints the table."""
    precision = group.computable(context_of("rollout", PpoSettings(precision=given.precision), {}, folder))
    shape = SHAPES[given.shape]
    if group.is_main():
        with announced("model made in"):
            save_model(shape.config(given.prompt + given.response), folder / "base")
            write_prompts(folder / "prompts", shape.vocabulary, given.prompt, given.rollouts * given.rounds)
    group.barrier()
    rows = [measured(given, folder, precision.settings.precision, together) for together in given.tensor_parallel]
    if group.is_main():
        sizes = f"{given.rollouts} x ({given.prompt} + {given.response}) tokens, {given.ranks} ranks"
        print(f"\n{given.shape}, {precision.settings.precision}, {sizes}; torch {torch.__version__}\n")
        for row in (COLUMNS, *rows):
            print("".join(f"{cell!s:>17}" for cell in row), flush=True)


def kind(word: str) -> Together:
    """Return how copies are held, as the setting names it."""
    return "gathered" if word == "gathered" else int(word)


def main() -> None:
    """Start the ranks."""
    made = parser(__doc__, rollouts=None, prompt=None, response=None, rounds=3, ranks=2)
    made.add_argument("--tensor-parallel", type=kind, nargs="+", default=[1, 2], metavar="N|gathered")
    given = made.parse_args()
    fill_in(given, rollouts=16, prompt=64, response=64)
    in_group(given, measure)


if __name__ == "__main__":
    main()
