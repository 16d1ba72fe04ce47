"""In-stage checkpoints: complete or ignored.

All ranks write into the folder of a checkpoint; then rank 0 writes ``complete.json``, which holds the number of ranks
and lists every file with its size. A folder without it, or with a file that is missing or of another size, was cut off
and is never read.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.attempt.folder import AttemptFolder

MARKER = "complete.json"
KEPT = 2
"""Checkpoints of an attempt that stay when one is completed, including that one."""


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def newest_complete(attempts: Iterable[Path]) -> Path | None:
    """Return the complete checkpoint of the highest step over all attempts at a key, or None."""
    checkpoints = [path for attempt in attempts for path in AttemptFolder(attempt).checkpoint_folders()]
    return max(filter(is_complete, checkpoints), key=lambda path: (step_of(path), path), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Return whether every file that the marker lists exists in its full size."""
    try:
        sizes = marker(checkpoint)["sizes"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def marker(checkpoint: Path) -> dict[str, Any]:
    """Return a marker's content: ``ranks``, their number, ``precision``, and ``sizes``, file to bytes."""
    return json.loads((checkpoint / MARKER).read_text())
