"""In-stage checkpoints as they lie: complete or ignored.

A checkpoint is a folder ``checkpoint-<step>`` in an attempt's ``checkpoints/``. All ranks write into it; when all have,
rank 0 writes ``complete.json``, which has their number and lists every file with its size. A folder without it, or with
a file that is missing or of another size, was cut off and is never read.
"""

import json
from pathlib import Path
from typing import Any

MARKER = "complete.json"
KEPT = 2
"""How many of an attempt's checkpoints stay when one is complete, itself included."""


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
        sizes = marker(checkpoint)["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def marker(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's marker says: ``ranks``, their number, ``precision``, and ``sizes``, file to bytes."""
    return json.loads((checkpoint / MARKER).read_text())
