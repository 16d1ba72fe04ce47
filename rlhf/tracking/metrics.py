"""The metrics file of an attempt, which must not fail.

JSON lines, each ``{"step": 3, "time": "2025-01-01T00:00:00.000+00:00", **metrics}``. JSON has no non-finite numbers,
and they matter most in a diverging run. They are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``,
the spelling of the Protocol Buffers JSON mapping, so that every line is valid JSON; `read_metrics` turns them back into
floats. No other value beside ``time`` is a string.

Steps never go backwards in the file. Several lines may share a step (training and evaluation report apart).
"""

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.errors import DamageError

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

MetricsRow = dict[str, Any]


class MetricsLog:
    """Appends to a metrics file, which outlives the process: a line that a kill left half-written is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _repair(path)
        self._last_step: int | None = rows[-1]["step"] if rows else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and hand it to the operating system: it survives the process, not a power cut.

        Raises ValueError where the step is before the last one (a resumed run calls `rewind` first) or a metric is
        named "step" or "time".
        """
        if self._last_step is not None and step < self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step} in {self.path}: rewind first")
        row: MetricsRow = {"step": step, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        for name, value in metrics.items():
            if name in row:
                raise ValueError(f"a metric cannot be named {name!r}")
            number = value if isinstance(value, int) else float(value)  # NumPy's scalars become plain numbers
            row[name] = number if isinstance(number, int) or math.isfinite(number) else json.dumps(number)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        self._last_step = step

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, so that a run resumed from that step's checkpoint writes each later step once.

        The kept lines replace the file in one rename: a kill in between leaves the old file or the new one.
        """
        kept = [row for row in _repair(self.path) if row["step"] <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._last_step = kept[-1]["step"] if kept else None


def read_metrics(path: Path) -> list[MetricsRow]:
    """Return the rows of a metrics file in order, non-finite values as floats; a half-written last line is left out.

    Raises DamageError where any other line cannot be read, and FileNotFoundError where there is no file.
    """
    rows, _ = _parse(path)
    return list(map(with_floats, rows))


def with_floats(row: MetricsRow) -> MetricsRow:
    """Return a row as JSON gave it with its non-finite values as floats."""
    return {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}


def _parse(path: Path) -> tuple[list[MetricsRow], int]:
    """Return the rows as JSON gave them, and their number of bytes, without a half-written last line."""
    rows: list[MetricsRow] = []
    size = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if number == len(lines):
                break
            raise DamageError(
                "a line of the metrics file is not one JSON object with a step",
                where=f"{path}:{number}",
                next_step="remove that line, or remove the file: only the history of this attempt is lost with it",
            )
        rows.append(row)
        size += len(line)
    return rows, size


def _repair(path: Path) -> list[MetricsRow]:
    """Return the whole rows of the file and cut a half-written last line off on disk."""
    if not path.exists():
        return []
    rows, size = _parse(path)
    if size < path.stat().st_size:
        os.truncate(path, size)
    return rows
