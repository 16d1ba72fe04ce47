"""PPO with the frozen models on all ranks, and on ranks of their own: ``python -m benchmarks.placement --ranks 2``.

The stage ppo runs through its own code on ``--ranks`` ranks of this machine, each with a GPU where there are any: once
with ``placement: together``, and for each of ``--parts`` with ``placement: apart``, in which ``--scorers`` of the ranks
score. Models have random weights, and the reward model the policy's shape or ``--reward-shape``; all prompts and
responses have one length. The first iteration is not counted; of the others the table has medians, in seconds.
"""

import argparse
import multiprocessing
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.limits import SHAPES, table
from benchmarks.ranks import (
    NORMALISER,
    context_of,
    fill_in,
    free_memory,
    free_port,
    parser,
    publish,
    save_model,
    with_lengths,
    write_prompts,
)
from rlhf.cluster.worker import Call, Location, prepare_deepspeed
from rlhf.cluster.worker_group import environments
from rlhf.config.ppo import PpoSettings
from rlhf.rollout import rollout
from rlhf.rollout.drawing import uniforms
from rlhf.stages import ppo
from rlhf.tracking import read_metrics
from rlhf.training import scorers
from rlhf.training.limits import ceilings
from rlhf.zero import group
from rlhf.zero.apart import is_set_apart


def saved_inputs(given: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Write what ppo takes."""
    # The reward model reads an EOS behind each response.
    context = given.prompt + given.response + 1
    vocabulary, normaliser = SHAPES[given.shape].vocabulary, NORMALISER | {"score_max_length": context}
    reward = SHAPES[given.reward_shape or given.shape].config(context)
    inputs = {
        "prompts": write_prompts(folder / "prompts", vocabulary, given.prompt, given.rollouts * given.iterations),
        "policy": save_model(SHAPES[given.shape].config(context), folder / "policy"),
        "reward": save_model(reward, folder / "reward", scores=True, normaliser=normaliser),
    }
    free_memory()
    return inputs


def settings_of(given: argparse.Namespace, placement: Mapping[str, Any]) -> PpoSettings:
    """Return the stage's settings."""
    return PpoSettings.model_validate(
        {
            "precision": given.precision,
            "value_init": "policy",
            "iterations": given.iterations,
            "rollouts": given.rollouts,
            "sampling": {"max_new_tokens": given.response},
            "max_prompt_length": given.prompt,
            "micro_batch_size": given.micro_batch,
            "samples_kept": 0,
            # Small, so that the weights stay as good as random.
            "policy_learning_rate": 1e-6,
            "value_learning_rate": 1e-6,
            "workers": {"count": given.ranks},
            **placement,
        }
    )


def of_full_length(seed: int, samples: Any, time: int) -> Tensor:
    """Return the random numbers that responses are drawn by, which never draw EOS."""
    return with_lengths(uniforms(seed, samples, time), [])


def be_rank(names: dict[str, str], settings: PpoSettings, inputs: dict[str, Path], folder: Path) -> None:
    """Run the stage as the rank that the environment names."""
    os.environ |= names
    if gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(names["LOCAL_RANK"]))
    context = context_of("ppo", settings, inputs, folder)
    prepare_deepspeed(Call("", context, gpu=gpu))
    rollout.uniforms = of_full_length
    (scorers if is_set_apart() else ppo).run(group.computable(context))
    group.barrier()


def measured(settings: PpoSettings, inputs: dict[str, Path], folder: Path) -> list[dict[str, float]]:
    """Run the stage on all ranks; return the metrics of all iterations but the first.

    Raises:
        RuntimeError: a rank failed; its output says why.
    """
    gpus = [(str(number),) for number in range(settings.workers.ranks)] if torch.cuda.is_available() else None
    places = [Location("here", "127.0.0.1", free_port(), gpu) for gpu in gpus or [()] * settings.workers.ranks]
    context_of("ppo", settings, inputs, folder)  # its folders
    make = partial(multiprocessing.get_context("spawn").Process, target=be_rank, daemon=True)
    ranks = [make(args=(names, settings, inputs, folder)) for _, names in environments(places, settings.set_apart)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a rank ended with status {process.exitcode}")
    return read_metrics(folder / "attempt" / "metrics.jsonl")[1:]


def row_of(name: str, settings: PpoSettings, rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return a row of the table."""
    parts = {part: median(row[f"time/{part}_s"] for row in rows) for part in ("rollout", "score", "train")}
    whole = median(sum(value for key, value in row.items() if key.startswith("time/")) for row in rows)
    waited = {title: median(row.get(f"perf/{key}", 0.0) for row in rows) for title, key in WAITED.items()}
    return (
        {"placement": name, "train on": settings.trainers, "score on": settings.set_apart}
        | parts
        | waited
        | {"whole": whole}
    )


WAITED = {"of score waiting": "waiting_s", "scorers busy": "scorers_s"}


def main() -> None:
    """Print the table."""
    sizes = {"rollouts": None, "prompt": None, "response": None, "iterations": 4, "ranks": 2, "scorers": 1}
    made = parser(__doc__, **sizes, micro_batch=16)
    made.add_argument("--reward-shape", choices=tuple(SHAPES), help="of the reward model, if it is not the policy's")
    made.add_argument("--parts", type=int, nargs="+", default=[1, 2], help="of an iteration's responses, each measured")
    given = made.parse_args()
    fill_in(given, rollouts=16, prompt=64, response=64)
    placements: dict[str, dict[str, Any]] = {"together": {}}
    for parts in given.parts:
        placements[f"apart, {parts} part(s)"] = {"placement": "apart", "scorers": given.scorers, "parts": parts}
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=given.scratch) as scratch:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        limits = ceilings(given.precision, device)
        inputs = saved_inputs(given, Path(scratch))
        for name, placement in placements.items():
            settings = settings_of(given, placement)
            rows.append(row_of(name, settings, measured(settings, inputs, Path(scratch) / name.replace(" ", "-"))))
            print(rows[-1], flush=True)
    publish(given, limits, table(rows), {"placements": rows})


if __name__ == "__main__":
    main()
