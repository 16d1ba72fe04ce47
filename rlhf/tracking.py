"""Where metrics go: a file in the attempt, which must not fail, and a W&B run, which may.

**Metrics file:** JSON lines, each ``{"step": 3, "time": "2025-01-01T00:00:00.000+00:00", **metrics}``. JSON has no
non-finite numbers, and they matter most in a diverging run. They are written as the strings ``"NaN"``, ``"Infinity"``
and ``"-Infinity"``, the spelling of the Protocol Buffers JSON mapping, so that every line is valid JSON; `read_metrics`
turns them back into floats. No other value beside ``time`` is a string.

Steps never go backwards in the file. Several lines may share a step (training and evaluation report apart).

**W&B** can never disturb the training that it reports on. One background thread makes all calls of ``wandb``: starting
takes seconds, or its whole time limit where there is no network, and a stuck ``wandb`` blocks its caller without end.
Training only puts metrics into a queue. At the first failure the run reports it in one line and stays off.

A restarted attempt continues the same run: the run's id comes from the attempt's key and ``resume`` is "allow". W&B's
own step counter only moves forward, but a run resumed from a checkpoint repeats steps, so each row carries its ``step``
as a metric and W&B draws every other metric over it. Offline, each start writes one more folder with the same id.
"""

import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

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


_Call = Callable[[Any, Any], None]
"""What is done with a run and the module wandb, on the thread of both."""
WandbMode = Literal["auto", "online", "offline", "disabled"]

# A row is a few hundred bytes and comes every few seconds: a queue of this length means that the thread is stuck.
_MAX_WAITING_CALLS = 10_000
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 60.0


def _drawn(wandb: Any, bins: Mapping[str, Any]) -> dict[str, Any]:
    return {name: wandb.Histogram(np_histogram=each) for name, each in bins.items()}


class WandbRun:
    """A run on Weights & Biases, or in a local folder where there is no key; off where anything fails.

    mode      "auto" is online with a key or login and offline without, unless the environment's WANDB_MODE is set
    group     shared by the runs of one pipeline
    name      the stage's instance
    folder    where wandb writes its files, the offline history among them
    config    the stage's settings, shown beside the curves
    warn      called with one line, at most once, and from another thread
    """

    def __init__(
        self,
        *,
        mode: WandbMode,
        project: str,
        entity: str | None,
        group: str,
        name: str,
        attempt_key: str,
        folder: Path,
        config: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._mode: WandbMode = mode
        self._folder = folder
        self._warn = warn
        self._init_arguments: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "name": name,
            # The same after every restart, and made of characters that W&B allows.
            "id": hashlib.sha256(attempt_key.encode()).hexdigest()[:16],
            "resume": "allow",
            "config": dict(config),
            "dir": folder,
        }
        self._calls: queue.Queue[_Call | None] = queue.Queue(_MAX_WAITING_CALLS)
        self._off = threading.Event()
        self._off_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if mode == "disabled":
            self._off.set()
        else:
            self._thread.start()

    # Each hands something over and returns at once, whatever wandb is doing.

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one row of metrics."""
        self._put(lambda run, _: run.log({"step": step, **metrics}))

    def distributions(self, step: int, bins: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
        """Hand over histograms by name: counts, and the edges of the bins, one more."""
        self._put(lambda run, wandb: run.log({"step": step} | _drawn(wandb, bins)))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand over a table of prompts, responses and scores."""
        names = ("prompt", "response", "score", "ended")
        data = [[str(row["prompt"]), row["response"], float(row["score"]), row["ended"]] for row in rows]
        self._put(lambda run, wandb: run.log({"step": step, "samples": wandb.Table(list(names), data)}))

    def alert(self, name: str, line: str) -> None:
        """Hand over an alarm, which W&B sends to where its user wants alerts."""
        self._put(lambda run, _: run.alert(title=f"alarm {name}", text=line))

    def finish(self, *, timeout: float = _FINISH_TIMEOUT_S) -> None:
        """Close the run, waiting at most ``timeout`` seconds for the rows that are still to be sent."""
        if self._off.is_set():
            return
        self._put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._switch_off(f"it did not finish within {timeout:.0f} s")

    def _put(self, call: "_Call | None") -> None:
        if self._off.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._switch_off(f"{_MAX_WAITING_CALLS} rows are waiting to be sent")

    def _work(self) -> None:
        """Start the run, log the rows that arrive, and close it; on the background thread."""
        try:
            run = self._start()
            while (call := self._calls.get()) is not None and not self._off.is_set():
                call(run, import_module("wandb"))
            run.finish(exit_code=0)
        except Exception as error:  # noqa: BLE001  training continues whatever fails here
            lines = str(error).splitlines()
            self._switch_off(lines[0] if lines else type(error).__name__)
        self._off.set()

    def _start(self) -> Any:
        """Start or continue the run; wandb prints, captures and copies nothing besides the metrics."""
        # wandb would use the temporary folder in place of one that it cannot write.
        self._folder.mkdir(parents=True, exist_ok=True)
        if not os.access(self._folder, os.R_OK | os.W_OK):
            raise PermissionError(f"{self._folder} cannot be written")

        # Reports of wandb's own errors would go to the same server, and be logged where it refuses them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # takes a second; only the rank that reports needs it

        wandb.setup(wandb.Settings(silent=True))
        mode = os.environ.get("WANDB_MODE") if self._mode == "auto" else self._mode
        if mode not in ("online", "offline", "disabled"):
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        settings = wandb.Settings(
            mode=mode,
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            reinit="create_new",
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
        )
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no key is configured: set WANDB_API_KEY or run `wandb login`")
        run = wandb.init(**self._init_arguments, settings=settings)
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run

    def _switch_off(self, why: str) -> None:
        with self._off_lock:
            if self._off.is_set():
                return
            self._off.set()
        key = os.environ.get("WANDB_API_KEY")
        if key:
            why = why.replace(key, "…")
        self._warn(f"Weights & Biases is off for this attempt: {why}")
