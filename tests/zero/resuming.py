"""Whole stages in a group of the tests: in one go, and stopped over and over and gone on with.

Every stop is an attempt of its own, as after a kill of the driver. What stops a stage is an exception right after a
checkpoint counts, a disk that is full when the next one is due, or a request to save and stop.
"""

import gc
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from rlhf.attempt.context import Context
from rlhf.config.grpo import GrpoSettings
from rlhf.config.ppo import PpoSettings
from rlhf.config.stages import DpoSettings, RmSettings, SftSettings
from rlhf.errors import DiskFullError, InterruptedRunError
from rlhf.models import folders
from rlhf.models.layout import is_adapter
from rlhf.models.micro_batches import MicroBatch
from rlhf.models.reward import FrozenReward
from rlhf.rollout.sequences import lay_out
from rlhf.stages import dpo, grpo, ppo, rm, sft
from rlhf.tracking import read_metrics
from rlhf.training import checkpoint_writer
from rlhf.training.policy import FrozenPolicy
from rlhf.zero import group
from tests import accelerator
from tests.pipeline.helpers import until
from tests.zero.groups import TIMEOUT_S
from tests.zero.inputs import MICRO_BATCHES, STAGE_NAMES, WITHOUT_COPIES

DONE = "done"
"""The file of an attempt that has ended, for the other group."""


class KilledError(Exception):
    """Stands for ``kill -9``."""


@dataclass(frozen=True)
class Stage:
    """A stage under test, and where it is stopped."""

    run: Callable[[Any], dict[str, float]]
    settings: Callable[[Path], Any]
    roles: Mapping[str, str]
    """Role to folder beside the data."""
    killed_after: tuple[int, ...]
    """Steps after whose checkpoints it is killed, one attempt after the other."""
    full_at: int | None
    """The step for whose checkpoint there is no room, in an attempt of its own."""
    asked_at: int | None
    """The first step of an attempt that is asked to stop from its start."""


def _sft(_: Path) -> SftSettings:
    # Eleven demonstrations: three steps an epoch, the last of them filled up with rows of the first.
    values = {"epochs": 2, "batch_size": 4, "max_length": 64, "packing": False, "checkpoint_every": 1}
    return SftSettings.model_validate(
        values | {"tuning": {"method": "lora", "rank": 4, "dropout": 0.2}, "optimizer": {"learning_rate": 1e-2}}
    )


def _rm(_: Path) -> RmSettings:
    # Eleven pairs again, every weight trained.
    values = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 64, "checkpoint_every": 1}
    return RmSettings.model_validate(values | {"responses_per_list": 2, "optimizer": {"learning_rate": 1e-3}})


def _dpo(_: Path) -> DpoSettings:
    # Eleven pairs; every weight is trained, so that no adapter holds the reference.
    values = {"epochs": 2, "batch_size": 4, "micro_batch_size": 2, "max_length": 64, "checkpoint_every": 1}
    return DpoSettings.model_validate(values | {"beta": 0.5, "optimizer": {"learning_rate": 1e-3}})


def policy_values(data: Path) -> dict[str, Any]:
    """Settings of a stage that updates a policy on its rewards."""
    return {
        "rewards": [{"function": f"{data / 'reward.py'}:reward"}],
        "iterations": 5,
        "rollouts": 8,
        "minibatches": 2,
        "epochs": 2,
        "sampling": {"max_new_tokens": 8},
        "kl": {"coef": 0.05, "target": 0.5, "horizon": 20},
        "ptx": {"coef": 0.5, "batch_size": 4, "max_length": 64},
        "average_decay": 0.8,
        "warmup_fraction": 0.2,
        "policy_learning_rate": 1e-3,
        "max_prompt_length": 32,
        "micro_batch_size": 2,
        "checkpoint_every": 1,
    }


def _ppo(data: Path, **more: Any) -> PpoSettings:
    values = {"value_init": "policy", "value_warmup": 1, "value_learning_rate": 1e-3}
    return PpoSettings.model_validate(policy_values(data) | values | more)


def _grpo(data: Path) -> GrpoSettings:
    # Groups are so small, and rewards so coarse, that some groups score the same.
    own = {
        "responses_per_prompt": 2,
        "dynamic_sampling": 2,
        "rewards": [{"function": f"{data / 'reward.py'}:coarse"}],
        "iterations": 4,
        "epochs": 1,
    }
    return GrpoSettings.model_validate(policy_values(data) | own)


POLICY_ROLES = {"policy": "tiny", "prompts": "prompts", "demonstrations": "demonstrations"}

PROMPTS, RESPONSES = ["a film", "the"], ["a joy", "dull , dull"]
METHODS: dict[str, Any] = {
    "adapter": {"method": "lora", "rank": 4},
    "merged": {"method": "lora", "rank": 4, "merge": True},
}

STAGES = {
    # Inside the first epoch, at its end, and inside the second.
    "sft": Stage(sft.run, _sft, {"base": "tiny", "demonstrations": "demonstrations"}, (3,), 5, 1),
    # Inside the first epoch, and at its end.
    "rm": Stage(
        rm.run,
        _rm,
        {"base": "tiny", "demonstrations": "demonstrations", "comparisons": "comparisons"},
        (),
        4,
        1,
    ),
    # Inside the second epoch, where the weights are far from the reference's.
    "dpo": Stage(dpo.run, _dpo, {"policy": "tiny", "comparisons": "comparisons"}, (4,), None, None),
    # While the value model alone is trained; then with everything.
    "ppo": Stage(ppo.run, _ppo, POLICY_ROLES, (), 4, 1),
    # When both models have taken steps.
    "ppo with adapters": Stage(
        ppo.run,
        lambda data: _ppo(data, tuning={"method": "lora", "rank": 4}, iterations=4, epochs=1),
        POLICY_ROLES,
        (2,),
        None,
        None,
    ),
    "ppo with one base": Stage(
        ppo.run,
        lambda data: _ppo(
            data,
            share_base=True,
            packing=True,
            tuning={"method": "lora"},
            rewards=[{}],
            value_init="reward",
            iterations=4,
            epochs=1,
        ),
        POLICY_ROLES | {"policy": "policy", "reward": "reward"},
        (2,),
        None,
        None,
    ),
    "grpo": Stage(grpo.run, _grpo, POLICY_ROLES, (2,), None, None),
}
assert tuple(STAGES) == STAGE_NAMES


def first_iterations(data: Path, folder: Path) -> dict[str, Any]:
    """What PPO makes in its first iteration, by the micro batches."""
    found: dict[str, Any] = {}
    for size, settings in MICRO_BATCHES.items():
        once = {"iterations": 1, "value_warmup": 0, "warmup_fraction": 0.0} | settings
        if group.world_size() > 1 and size in WITHOUT_COPIES:
            once["rollout"] = {"tensor_parallel": WITHOUT_COPIES[size]}
            once["workers"] = {"count": 2}
        stage = replace(STAGES["ppo"], settings=partial(_ppo, **once))
        found[size] = outcome(stage, attempt_of(context_of("ppo", stage, data, folder), folder / size, ()))
    return found


def forms(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What each stage writes when it trains an adapter and one that it folds in: all weights, folded.

    And what evaluate reads in it, and at the ``start``: log-probabilities, or scores. ``tests.zero.grid`` has the other
    ways of fine-tuning.
    """
    by_stage: dict[str, dict[str, Any]] = {}
    for name in ("sft", "rm", "ppo"):
        by_stage[name] = {}
        for form, method in METHODS.items():
            short = {"tuning": method, "checkpoint_every": 100} | (
                {"iterations": 1, "value_warmup": 0, "warmup_fraction": 0.0, "epochs": 1}
                if name == "ppo"
                else {"epochs": 1, "batch_size": 8}
            )
            known = STAGES[name].settings(data)
            settings = type(known).model_validate(known.model_dump() | short)
            stage = replace(STAGES[name], settings=lambda _, settings=settings: settings)
            context = attempt_of(context_of(name, stage, data, folder), folder / f"{name}-{form}", ())
            stage.run(context)
            forget()
            model = folders.load_whole(context.output, scores=name == "rm", dtype=torch.float32)
            read = _scores(context.output) if name == "rm" else _logprobs(context.output)
            kept = {"adapter": is_adapter(context.output), "weights": model.state_dict(), "read": read}
            by_stage[name][form] = kept
    by_stage["start"] = {"read": _logprobs(data / "tiny")}
    return by_stage


def _scores(folder: Path) -> torch.Tensor:
    return FrozenReward(folder, "fp32", MicroBatch(2)).score(PROMPTS, RESPONSES)


def _logprobs(folder: Path) -> torch.Tensor:
    sequences = lay_out([[5, 6, 7], [8]], [[40, 41], [42, 43, 44]], pad=0)
    return torch.where(sequences.mask, FrozenPolicy(folder, "fp32", 1.0, MicroBatch(2)).logprobs(sequences), 0.0)


def context_of(name: str, stage: Stage, data: Path, folder: Path) -> Context[Any]:
    return Context(
        stage=name,
        key="0" * 64,
        settings=stage.settings(data),
        inputs={role: data / part for role, part in stage.roles.items()},
        output=folder,
        attempt=folder,
        cache=folder,
        tracking={"mode": "disabled"},
    )


def unbroken_and_resumed(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """What a stage makes in one go, and what it makes after all its stops; and what the full disk was told."""
    stage = STAGES[name]
    context = context_of(name.split(" ")[0], stage, data, folder)
    found: dict[str, Any] = {"unbroken": outcome(stage, attempt_of(context, folder / "unbroken", ()))}

    attempts: tuple[Path, ...] = ()
    stops: dict[int | None, Callable[[int], AbstractContextManager[None]]] = {
        stage.asked_at: nullcontext,
        stage.full_at: _full_disk_at,
    }
    stops |= dict.fromkeys(stage.killed_after, killed_after)
    for number, step in enumerate(sorted(step for step in stops if step is not None)):
        one = attempt_of(context, folder / str(number), attempts)
        attempts = one.attempts
        if step == stage.asked_at:
            one.folder.stop.touch()
        try:
            with stops[step](step):
                stage.run(one)
        except KilledError:
            pass
        except InterruptedRunError as error:
            newest = checkpoint_writer.newest_complete(list(attempts))
            found["asked"] = {"what": error.what, "newest": newest and newest.name}
        except DiskFullError as error:
            newest = checkpoint_writer.newest_complete(list(attempts))
            found["full"] = {"error": error, "newest": newest and newest.name, "begun": _has(one, step)}
        else:
            raise AssertionError(f"{name} was not stopped at step {step}")
        forget()
    found["resumed"] = outcome(stage, attempt_of(context, folder / "last", attempts))
    if name != "sft":  # Its dropout is drawn on each rank.
        others = of_other_group(folder / "unbroken")
        found["continued"] = continued_from(stage, context, others, folder / "continued")
    return found


def continued_from(stage: Stage, context: Context[Any], others: Path, folder: Path) -> dict[str, Any]:
    """What a stage makes from the newest checkpoint of the group of another size, which runs beside this one."""
    until((others / DONE).exists, f"{others}: the other group's run", TIMEOUT_S)
    return outcome(stage, attempt_of(context, folder, (others,)))


def of_other_group(folder: Path) -> Path:
    """The folder of the other group that has the place of one of this group's."""
    world = group.world_size()
    (place,) = [place for place in (folder, *folder.parents) if place.name == str(world)]
    return place.parent / str(3 - world) / folder.relative_to(place)


def _has(context: Context[Any], step: int) -> bool:
    return context.folder.checkpoint(step).exists()


def attempt_of(context: Context[Any], folder: Path, earlier: tuple[Path, ...]) -> Context[Any]:
    if group.is_main():
        (folder / "output").mkdir(parents=True)
    group.barrier()
    return replace(context, attempt=folder, output=folder / "output", attempts=(*earlier, folder))


def outcome(stage: Stage, context: Context[Any]) -> dict[str, Any]:
    metrics = stage.run(context)
    forget()
    rows = read_metrics(context.attempt / "metrics.jsonl")
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(context.output.rglob("*.safetensors")):
        weights |= {f"{file.name} {name}": tensor for name, tensor in load_file(file).items()}
    newest = checkpoint_writer.newest_complete([context.attempt])
    if group.is_main():
        (context.attempt / DONE).touch()
    return {
        "metrics": metrics,
        "newest": newest and newest.name,
        "rows": [{name: value for name, value in row.items() if not name.startswith(("time", "perf"))} for row in rows],
        "weights": weights,
        "samples": samples.read_text() if (samples := context.attempt / "samples.jsonl").exists() else None,
    }


def forget() -> None:
    """Begin the next attempt as a new process would."""
    group.barrier()
    accelerator.forget()
    gc.freeze()  # each attempt collects garbage some twenty times, and what libraries keep grows with every attempt


@contextmanager
def killed_after(step: int) -> Generator[None]:
    mark_complete = checkpoint_writer.mark_complete

    def then_die(checkpoint: Path, context: Context[Any]) -> None:
        mark_complete(checkpoint, context)
        if checkpoint_writer.step_of(checkpoint) == step:
            raise KilledError

    with patch.object(checkpoint_writer, "mark_complete", then_die):
        yield


@contextmanager
def _full_disk_at(step: int) -> Generator[None]:
    writing, usage = checkpoint_writer.writing, shutil.disk_usage

    @contextmanager
    def with_little_room(context: Context[Any], at: int, estimate: int) -> Generator[Path]:
        free = 1_000 if at == step else usage(context.attempt).free
        little = usage(context.attempt)._replace(free=free)
        with patch.object(shutil, "disk_usage", return_value=little), writing(context, at, estimate) as checkpoint:
            yield checkpoint

    with patch.object(checkpoint_writer, "writing", with_little_room):
        yield
