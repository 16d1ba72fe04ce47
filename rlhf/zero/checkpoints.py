"""In-stage checkpoints: complete or ignored.

A checkpoint is a folder ``checkpoint-<step>`` in an attempt's ``checkpoints/``. All ranks write into it; when all have,
rank 0 writes ``complete.json``, which has their number and lists every file with its size. A folder without it, or with
a file that is missing or of another size, was cut off and is never read.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rlhf.errors import PreflightError
from rlhf.pipeline.context import Context
from rlhf.zero import group

MARKER = "complete.json"
KEPT = 2


def path_of(attempt: Path, step: int) -> Path:
    """Where an attempt's checkpoint of a step lies."""
    return attempt / "checkpoints" / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_complete(attempts: list[Path]) -> Path | None:
    """The complete checkpoint of the highest step over all attempts at a key, or None."""
    found = [
        checkpoint
        for attempt in attempts
        for checkpoint in attempt.glob("checkpoints/checkpoint-*")
        if checkpoint.name.removeprefix("checkpoint-").isdigit() and is_complete(checkpoint)
    ]
    return max(found, key=lambda checkpoint: (step_of(checkpoint), checkpoint), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the marker lists is there, whole."""
    try:
        sizes = _marker(checkpoint)["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoint_to_resume(context: Context[Any]) -> Path | None:
    """The checkpoint that a stage goes on from, or None.

    Raises:
        PreflightError: it was written by another number of ranks, whose shards DeepSpeed cannot deal out anew.
    """
    newest = newest_complete(list(context.attempts))
    if newest is None or (ranks := _marker(newest)["ranks"]) == group.world_size():
        return newest
    raise PreflightError(
        f"{context.stage} has a checkpoint of {ranks} rank(s) at step {step_of(newest)}, which {group.world_size()} "
        "cannot go on from",
        str(newest),
        f"{context.stage}.workers.count={ranks}, or remove that folder to start the stage anew",
    )


def _marker(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / MARKER).read_text())


def mark_complete(checkpoint: Path) -> None:
    """Make a checkpoint that all ranks have written count, then sweep older and half-written ones of its attempt.

    A collective: every rank must call it after its own writes.
    """
    group.barrier()
    if group.is_main():
        sizes: dict[str, int] = {}
        for path in sorted(checkpoint.rglob("*")):
            if path.is_file():
                _sync(path)
                sizes[str(path.relative_to(checkpoint))] = path.stat().st_size
        temporary = checkpoint / f".{MARKER}"
        temporary.write_text(json.dumps({"ranks": group.world_size(), "sizes": sizes}))
        _sync(temporary)
        temporary.replace(checkpoint / MARKER)
        _sync(checkpoint)
        _sweep(checkpoint)
    group.barrier()


def _sweep(newest: Path) -> None:
    older = [path for path in newest.parent.glob("checkpoint-*") if step_of(path) < step_of(newest)]
    complete = sorted((path for path in older if is_complete(path)), key=step_of)
    for path in [*complete[: -(KEPT - 1)], *(path for path in older if path not in complete)]:
        shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
