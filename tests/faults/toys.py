"""Stages without a model: a task, and a worker group that adds up numbers step by step and can be stopped anywhere."""

import json
import time
from pathlib import Path
from typing import Literal

from rlhf.attempt.context import Context
from rlhf.config.base import Settings, runtime, semantic
from rlhf.config.stages import WorkerSettings
from rlhf.pipeline.stage import Input, Stage, taking

DONE = "done.txt"
"""In an attempt of ``steps``: every step that rank 0 did, one a line."""
Behaviour = Literal["well", "hangs", "allocates"]


class SeedSettings(Settings):
    """What is added to."""

    start: int = semantic(7)
    """The first number."""


class StepsSettings(Settings):
    """How numbers are added up."""

    steps: int = semantic(12, ge=1)
    """How many numbers."""
    checkpoint_every: int = runtime(4, ge=1)
    """Steps between checkpoints."""
    micro_batch_size: int = runtime(4, ge=1)
    """Changes nothing."""
    seconds: float = runtime(0.05)
    """How long a step takes."""
    behaviour: Behaviour = runtime("well")
    """What goes wrong at step 5 of the last rank: for ever, but a hang only once in an attempt."""
    workers: WorkerSettings = runtime(WorkerSettings())
    """Its ranks."""


def seed(context: Context[SeedSettings]) -> dict[str, float]:
    (context.output / "seed.json").write_text(json.dumps(context.settings.start))
    return {}


class Sum:
    """The state between steps."""

    def __init__(self, total: float) -> None:
        self.total = total

    def checkpoint_bytes(self) -> int:
        return 100

    def save(self, checkpoint: Path) -> None:
        from rlhf.zero import group

        if group.is_main():
            (checkpoint / "sum.json").write_text(json.dumps(self.total))
        group.barrier()

    def load(self, checkpoint: Path) -> None:
        self.total = json.loads((checkpoint / "sum.json").read_text())


def steps(context: Context[StepsSettings]) -> dict[str, float]:
    import torch

    from rlhf.training.loop import resumable_steps
    from rlhf.zero import group

    settings = context.settings
    state = Sum(json.loads((context.inputs["seed"] / "seed.json").read_text()))
    if settings.behaviour == "allocates" and group.is_main() and context.folder.micro_batch.get() is None:
        # As a stage whose settings leave the size to its ranks.
        context.folder.micro_batch.write({"size": settings.micro_batch_size})
    for step in resumable_steps(context, settings.steps, settings.checkpoint_every, [state]):
        time.sleep(settings.seconds)
        if step == 5 and group.rank() == group.world_size() - 1:
            _misbehave(settings.behaviour, context.attempt / "misbehaved")
        # The same whatever the number of ranks.
        state.total += float(group.all_sum(torch.tensor(step / group.world_size())))
        if group.is_main():
            with (context.attempt / DONE).open("a") as file:
                file.write(f"{step}\n")
            context.progress("adding", step + 1, settings.steps)
    if group.is_main():
        (context.output / "config.json").write_text(json.dumps(round(state.total, 6)))
    group.barrier()
    return {"steps/total": state.total}


def _misbehave(behaviour: Behaviour, once: Path) -> None:
    match behaviour:
        case "hangs" if not once.exists():
            once.touch()
            stand_still()
        case "allocates":
            bytearray(1 << 62)
        case _:
            pass


def stand_still() -> None:
    while True:
        time.sleep(0.05)


SEED = Stage("seed", 1, SeedSettings, "tests.faults.toys:seed", "data", inputs=taking())
STEPS = Stage(
    "steps",
    1,
    StepsSettings,
    "tests.faults.toys:steps",
    "policy",
    inputs=taking(seed=Input("seed", ("data",))),
    runs="workers",
    imports=("transformers.modeling_utils", "datasets"),
)
KNOWN = {stage.name: stage for stage in (SEED, STEPS)}
