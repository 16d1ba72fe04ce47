"""A stage that takes steps, writes a checkpoint after each, and goes on from the newest of any attempt at its key."""

import json
from pathlib import Path

from rlhf.attempt.context import Context
from rlhf.attempt.folder import MARKER, AttemptFolder, newest_complete, step_of
from rlhf.config.base import Settings, runtime, semantic
from rlhf.pipeline.stage import Stage, taking
from tests.pipeline.toys import wait_for


class SteppingSettings(Settings):
    """How many steps, and where to wait."""

    steps: int = semantic(4, ge=1)
    """How many."""
    gate: str | None = runtime(None)
    """A file that is waited for before the last step; beside it, ``.started`` tells that the stage is there."""


def write_checkpoint(attempt: Path, step: int) -> Path:
    """A checkpoint of two ranks, and the metrics up to it."""
    with (attempt / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    folder = AttemptFolder(attempt).checkpoint(step)
    (folder / "deep").mkdir(parents=True)
    shards = {"shard-0": f"{step} of 0".encode(), "deep/shard-1": f"{step} of 1".encode()}
    for name, data in shards.items():
        (folder / name).write_bytes(data)
    temporary = folder / f".{MARKER}"
    temporary.write_text(json.dumps({"ranks": 2, "sizes": {name: len(data) for name, data in shards.items()}}))
    temporary.replace(folder / MARKER)
    return folder


def run(context: Context[SteppingSettings]) -> dict[str, float]:
    newest = newest_complete(list(context.attempts))
    first = step_of(newest) + 1 if newest is not None else 1
    for step in range(first, context.settings.steps + 1):
        if step == context.settings.steps:
            wait_for(context.settings.gate)
        write_checkpoint(context.attempt, step)
        context.progress(f"step {step}/{context.settings.steps}", step, context.settings.steps)
    (context.output / "config.json").write_text("{}")
    return {"first": float(first)}


STEPPING = Stage("stepping", 1, SteppingSettings, "tests.pipeline.stepping:run", "policy", inputs=taking())
KNOWN = {STEPPING.name: STEPPING}
