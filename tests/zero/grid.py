"""Every way of fine-tuning in every stage, in a group: ``python -m tests.zero.groups tests.zero.grid FOLDER``.

Starting a group costs more than a run, so one start makes all of them. What rank 0 saw of each run is kept in
``FOLDER/grid.pt`` for the tests to judge.
"""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from torch import Tensor

from rlhf.models import text, tuning
from rlhf.rollout.speaker import Speaker
from rlhf.stages import rm
from rlhf.training import policy, trl_trainers
from rlhf.zero import engine, group
from tests.zero.inputs import ANSWER_TOKENS, PROMPT
from tests.zero.resuming import STAGES, attempt_of, context_of, outcome

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"

SIZES = (1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "top": {"method": "top", "blocks": 1},
    "bottom-frozen": {"method": "bottom-frozen", "blocks": 1},
    # Of three blocks two have begun when the two steps of a run are over, and the second of them after the resume.
    "gradual": {"method": "gradual", "every": 1, "decay": 2.0},
    "transfer": {"method": "transfer"},
    "lora": {"method": "lora", "rank": 4, "dropout": 0.1},
    "lora of some modules": {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"], "rslora": True},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "pissa": {"method": "lora", "rank": 4, "init": "pissa"},
    "prompt": {"method": "prompt", "tokens": 4, "text": "a film of joy"},
    "p-tuning": {"method": "p-tuning", "template": [2, " film", 2]},
    "prefix": {"method": "prefix", "tokens": 4, "hidden_size": 16},
    "p-tuning-v2": {"method": "p-tuning-v2", "tokens": 4},
    "ia3": {"method": "ia3"},
}
VIRTUAL = ("prompt", "p-tuning", "prefix", "p-tuning-v2")
LEARNING_RATE = 1e-2
NAMES = ("sft", "rm", "ppo")


def cells(size: int) -> list[tuple[str, str]]:
    """Stages and methods that a group of so many ranks runs.

    Two ranks run each method in one of the stages, in turn, and the two that most people use in all.
    """
    return [
        (name, method)
        for number, method in enumerate(METHODS)
        for place, name in enumerate(NAMES)
        if size == 1 or method in ("full", "lora") or number % len(NAMES) == place
    ]


_SUPERVISED = {
    "epochs": 2,
    "batch_size": 8,
    "micro_batch_size": 4,
    "optimizer": {"learning_rate": LEARNING_RATE, "warmup_fraction": 0.0},
}
# Two optimiser steps, on all rows each, with a checkpoint between them.
SHORT: dict[str, dict[str, Any]] = {
    "sft": _SUPERVISED,
    "rm": _SUPERVISED,
    "ppo": {
        "iterations": 2,
        "rollouts": 4,
        "epochs": 1,
        "minibatches": 1,
        "value_warmup": 0,
        "warmup_fraction": 0.0,
        "average_decay": None,
        "sampling": {"max_new_tokens": 4},
        "ptx": {"coef": 0.0},
        "policy_learning_rate": LEARNING_RATE,
    },
}


@dataclass
class Watched:
    """What is seen of the model that a stage trains while the stage runs; weights are whole, on rank 0."""

    start: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Weights before the first step, by name."""
    end: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Weights after the last step."""
    trained: list[str] = field(default_factory=list[str])
    """Names of the weights that the optimiser has."""
    logits: Tensor | None = None
    """Logits or scores of :data:`PROMPT` after the last step."""


@contextmanager
def watching(ids: Tensor) -> Generator[Watched]:
    """Inside, the first model that a stage prepares is watched until its weights are exported."""
    watched, prepared, whole_weights = Watched(), tuning.prepared, engine.whole_weights

    def prepare(*arguments: Any, **named: Any) -> Any:
        model = prepared(*arguments, **named)
        if not watched.trained:
            watched.start = whole_weights(model, trained_only=False)
            watched.trained = [name for name, _ in engine.trained(model)]
        return model

    @torch.no_grad()
    def export(model: Any, **named: Any) -> dict[str, Tensor]:
        watched.end = whole_weights(model, trained_only=False)
        watched.logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return whole_weights(model, **named)

    with (
        patch.object(rm, "prepared", prepare),
        patch.object(tuning, "prepared", prepare),
        patch.object(trl_trainers, "whole_weights", export),
        patch.object(policy, "whole_weights", export),
    ):
        yield watched


def run(name: str, method: dict[str, Any], data: Path, folder: Path) -> dict[str, Any]:
    """Run a stage in one go, and once more from its checkpoint."""
    settings = _settings(name, data, tuning=method, checkpoint_every=1)
    stage = replace(STAGES[name], settings=lambda _: settings)
    context = context_of(name, stage, data, folder)
    whole = attempt_of(context, folder / "whole", ())
    ids = text.prompt_ids(text.load_tokenizer(data / "tiny"), PROMPT)
    with watching(torch.tensor([ids])) as watched:
        observed: dict[str, Any] = {"unbroken": outcome(stage, whole)}
    observed["resumed"] = outcome(stage, attempt_of(context, folder / "resumed", whole.attempts))
    observed |= vars(watched) | {"folder": whole.output, "ids": ids}
    if group.is_main() and name != "rm":
        observed["answer"] = Speaker(whole.output).answers([PROMPT], 0.0, ANSWER_TOKENS, seed=0)[0]
    return observed


def go_on(name: str, method: dict[str, Any], data: Path, folder: Path, results: dict[str, Path]) -> dict[str, Any]:
    """Run a next stage by the same method: the stage again, and of ppo one on the results of ppo and rm.

    results  of the method, by the stage's name
    """
    once = {
        "sft": {"epochs": 1},
        "rm": {"epochs": 1},
        "ppo": {"iterations": 1, "value_init": "reward", "rewards": [{}]},
    }
    settings = _settings(name, data, tuning=method, **once[name])
    stage = replace(STAGES[name], settings=lambda _: settings)
    context = context_of(name, stage, data, folder)
    before = {"policy": results["ppo"], "reward": results["rm"]} if name == "ppo" else {"base": results[name]}
    return outcome(stage, attempt_of(replace(context, inputs={**context.inputs, **before}), folder, ()))


def _settings(name: str, data: Path, **more: Any) -> Any:
    known = STAGES[name].settings(data)
    # As on GPUs; virtual tokens cannot be packed.
    packed = {"packing": True} if name == "ppo" and more["tuning"]["method"] not in VIRTUAL else {}
    return type(known).model_validate(known.model_dump() | SHORT[name] | packed | more)


def main(rank: int, world_size: int, folder: Path) -> None:
    """Run the grid together with the other ranks."""
    torch.set_num_threads(1)
    # DeepSpeed would compile its shared-memory collectives, which takes half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    meeting = f"file://{folder / 'meeting'}"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, init_method=meeting, rank=rank, world_size=world_size)
    done: dict[tuple[str, str], dict[str, Any]] = {}
    for name, label in cells(world_size):
        start, method = time.process_time(), METHODS[label]
        cell = folder / f"{name}-{label}".replace(" ", "-")
        done[name, label] = run(name, method, folder.parent, cell)
        if world_size == 1:
            results = {stage: done[stage, label]["folder"] for stage in NAMES if (stage, label) in done}
            done[name, label]["next"] = go_on(name, method, folder.parent, cell / "next", results)
        # The machine may be busy with other things.
        print(f"{name}, {label}: {time.process_time() - start:.1f} s of this process", flush=True)
    if group.is_main():
        torch.save(done, folder / "grid.pt")
    dist.destroy_process_group()
