"""Whole stages in a group of the tests, by what is sharded, offloaded and computed again."""

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from torch import Tensor

from rlhf.config.zero import ZeroSettings
from rlhf.zero import engine, group
from tests.zero.inputs import MEMORY_STAGES
from tests.zero.resuming import (
    STAGES,
    KilledError,
    Stage,
    attempt_of,
    context_of,
    continued_from,
    forget,
    killed_after,
    of_other_group,
    outcome,
)

VARIANTS: Mapping[str, dict[str, Any]] = {
    "stage 3": {},
    # With an order of weights that DeepSpeed's own table of their places does not know of.
    "stage 1": {"zero": {"config": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}}},
    "stage 2": {
        "zero": {"stage": 2},
        "activation_checkpointing": True,
        "micro_batch_size": None,
        "micro_batch_tokens": 128,
    },
    "offloaded": {
        "zero": {"offload_optimizer": "cpu", "offload_parameters": "cpu"},
        "activation_checkpointing": True,
    },
}
ON_NODES = ZeroSettings.model_validate(
    # Without it weights this small are whole on every rank all the time.
    {
        "secondary_partition": 2,
        "config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    }
)
"""Of four ranks, those of two nodes."""
RESUMED = (("sft", "stage 2"), ("rm", "offloaded"), ("ppo", "offloaded"))
CONTINUED = {"sft": "stage 1", "rm": "stage 2", "ppo": "offloaded"}
"""As what the two ranks compute from whose checkpoint the one goes on, and which go on from its checkpoint."""
_SHORT: Mapping[str, dict[str, Any]] = {
    # Dropout is drawn on each rank.
    "sft": {"epochs": 1, "tuning": {"method": "lora", "rank": 4}},
    "rm": {"epochs": 1, "micro_batch_size": 1},
    "ppo": {"iterations": 2, "value_warmup": 0, "minibatches": 1, "epochs": 1},
}
assert tuple(_SHORT) == MEMORY_STAGES


def memory(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What each stage makes in three steps, PPO in two iterations; and what it makes when killed after the first.

    One rank makes it in stage 3, and two make the rest.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    for name, short in _SHORT.items():
        outcomes[name] = {}
        for variant, values in VARIANTS.items():
            if (variant == "stage 3") != (group.world_size() == 1):
                continue
            stage = _stage_of(name, data, short | values)
            context = context_of(name, stage, data, folder)
            place, theirs = (
                folder / f"{name}-{one.replace(' ', '-')}"
                for one in (variant, CONTINUED[name] if variant == "stage 3" else "stage 3")
            )
            with patch.object(engine, "checkpoint", wraps=engine.checkpoint) as checkpoint:
                outcomes[name][variant] = outcome(stage, attempt_of(context, place, ()))
            outcomes[name][variant]["recomputed"] = checkpoint.call_count
            if (name, variant) in RESUMED:
                outcomes[name][f"{variant}, resumed"] = _resumed(stage, context, place)
            if variant in ("stage 3", CONTINUED[name]):
                continued = continued_from(stage, context, of_other_group(theirs), folder / f"{name}-continued")
                outcomes[name]["continued"] = continued
    return outcomes


def on_nodes(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The same by ranks that keep the weights a second time; rm and ppo killed after the first step, rm offloaded."""
    outcomes: dict[str, dict[str, Any]] = {}
    for name, short in _SHORT.items():
        offloaded = {"offload_optimizer": "cpu", "offload_parameters": "cpu"} if name == "rm" else {}
        stage = _stage_of(name, data, short | {"zero": ON_NODES.model_dump() | offloaded})
        context, place = context_of(name, stage, data, folder), folder / name
        with counted_gathers() as gathers:
            if name == "sft":
                outcomes[name] = outcome(stage, attempt_of(context, place, ()))
            else:
                outcomes[name] = _resumed(stage, context, place)
        outcomes[name]["gathers"] = dict(gathers)
    return outcomes


def _stage_of(name: str, data: Path, values: Mapping[str, Any]) -> Stage:
    known = STAGES[name].settings(data)
    settings = type(known).model_validate(known.model_dump() | values)
    return replace(STAGES[name], settings=lambda _: settings)


@contextmanager
def counted_gathers() -> Generator[Counter[int]]:
    """Inside, the numbers that modules gather before they compute, by the size of the group that gathers them."""
    counted: Counter[int] = Counter()
    theirs: Any = partition_parameters
    gather = theirs._dist_allgather_fn

    def counting(shard: Tensor, whole: Tensor, ranks: Any = None) -> Any:
        counted[dist.get_world_size(ranks)] += whole.numel()
        return gather(shard, whole, ranks)

    with patch.object(theirs, "_dist_allgather_fn", counting):
        yield counted


def _resumed(stage: Stage, context: Any, place: Path) -> dict[str, Any]:
    first = attempt_of(context, place / "first", ())
    with suppress(KilledError), killed_after(1):
        stage.run(first)
    forget()
    return outcome(stage, attempt_of(context, place / "last", first.attempts))
