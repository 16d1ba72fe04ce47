"""What an attempt takes: ranks, GPUs and time, noted in its folder so that it is known of attempts that failed too."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESOURCES = "resources.json"
"""In an attempt: its ranks and GPUs, written when it begins."""
RANKS = "device-{}.json"
"""In an attempt: where a rank ran, written by the rank."""


def begin(attempt: Path, ranks: int, gpus: int) -> None:
    """Note what an attempt is given."""
    (attempt / RESOURCES).write_text(json.dumps({"ranks": ranks, "gpus": gpus}), encoding="utf-8")


def resources_of(attempt: Path) -> dict[str, Any]:
    """An attempt's ranks and GPUs, and the hosts and devices of the ranks; nothing where they are not known."""
    given = _read(attempt / RESOURCES)
    if not given:
        return {}
    ranks = [found for path in sorted(attempt.glob(RANKS.format("*"))) if (found := _read(path))]
    hosts = sorted({str(rank["host"]) for rank in ranks})
    return given | {"hosts": hosts, "devices": sorted({str(rank["device"]) for rank in ranks})}


def earlier_attempts(attempts: Sequence[Path]) -> list[dict[str, Any]]:
    """Name, seconds, ranks and GPUs of attempts that came to nothing.

    The seconds are those from their beginning to the last sign of life: a process that was killed notes no end. Both
    are times of one file system, so that clocks need not agree.
    """
    found: list[dict[str, Any]] = []
    for attempt in attempts:
        given = _read(attempt / RESOURCES)
        if given:
            begun = (attempt / RESOURCES).stat().st_mtime
            seconds = max(path.lstat().st_mtime for path in attempt.iterdir()) - begun
            found.append({"attempt": attempt.name, "seconds": round(seconds, 3)} | given)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # killed before it was written: a cost that is not known must not stop a commit
