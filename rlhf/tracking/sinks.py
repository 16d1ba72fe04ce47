"""Sinks of metrics: what each must do, and the thread that keeps it from disturbing the training that it reports on.

One background thread makes all calls of a sink's library: importing and starting one takes seconds, or its whole time
limit where there is no network, and a stuck library blocks its caller without end. Training only puts calls into a
queue. At its first failure a sink reports it in one line and stays off; the other sinks and training go on.

A restarted attempt continues the same run: its name comes from the attempt's key. It resumes from a checkpoint, so it
repeats steps that the sink may have, and the kill may have lost others. Therefore the sink is given the metrics file
from its beginning, and what it has already, by its own account, is left out.
"""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rlhf.errors import PreflightError

# A row is a few hundred bytes and comes every few seconds: a queue of this length means that the thread is stuck.
_MAX_WAITING_CALLS = 10_000
_FINISH_TIMEOUT_S = 60.0
_SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "TRACKIO_WRITE_TOKEN", "HF_TOKEN")
NOTHING = -1
"""The last step of a run that has none."""

Bins = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Histograms by name: counts, and the edges of the bins, one more."""


@dataclass(frozen=True)
class TrackedStage:
    """What a sink shows of a stage beside its metrics."""

    name: str
    """The instance."""
    key: str
    """Of the result: the same after every restart."""
    pipeline: str
    group: str
    """Shared by the stages of one pipeline with one set of settings."""
    project: str
    attempt: Path
    """The attempt's folder."""
    folder: Path
    """Of what all runs share."""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The settings, as JSON values."""
    entity: str | None = None
    """W&B's user or team."""
    mode: str = "auto"
    """Of W&B: "auto" is online with a key or login and offline without, unless WANDB_MODE is set."""
    result: tuple[str, str] = ("", "")
    """Kind, and address in the store."""
    inputs: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Instance that made an input, to its kind and address in the store."""

    @property
    def run(self) -> str:
        """The run's name, unique in its group."""
        return f"{self.name}-{self.key[:8]}"


class Sink(Protocol):
    """A place that metrics are sent to. All methods are called on one thread; each may block or raise."""

    title: str
    """For the user."""

    def start(self, resumed_at: int, /) -> int:
        """Begin or continue the run; return the last step that it has whole, or `NOTHING`.

        resumed_at  the step of the checkpoint that the stage resumes from; 0 without one
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float], at: float, /) -> None:
        """Send a row; a number may be non-finite.

        at  seconds since 1970
        """
        ...

    def distributions(self, step: int, bins: Bins, /) -> None:
        """Send histograms."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], /) -> None:
        """Send prompts and responses with "prompt", "response", "score" and "ended"."""
        ...

    def alert(self, step: int, name: str, line: str, /) -> None:
        """Send an alarm, which was raised for the first time."""
        ...

    def finish(self) -> str | None:
        """Close the run; return a line for the user where something is left to do."""
        ...


class SinkThread:
    """A sink on a thread of its own; off where anything fails. Each method hands over and returns at once.

    history     rows of the metrics file up to the step that the stage resumes from
    tell        called with one line for the user, at most once where it fails, and from any thread
    """

    def __init__(
        self, sink: Sink, history: Sequence[Mapping[str, Any]], resumed_at: int, tell: Callable[[str], None]
    ) -> None:
        self._sink, self._history, self._resumed_at, self._tell = sink, history, resumed_at, tell
        self._calls: queue.Queue[Callable[[], object] | None] = queue.Queue(_MAX_WAITING_CALLS)
        self._last = NOTHING
        self._farewell: str | None = None
        self._off = threading.Event()
        self._off_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=sink.title, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one row of metrics."""
        at = time.time()
        self._put(lambda: self._unless_there(step, lambda: self._sink.log(step, metrics, at)))

    def distributions(self, step: int, bins: Bins) -> None:
        """Hand over histograms."""
        self._put(lambda: self._unless_there(step, lambda: self._sink.distributions(step, bins)))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Hand over prompts and responses with their scores."""
        self._put(lambda: self._unless_there(step, lambda: self._sink.samples(step, rows)))

    def alert(self, step: int, name: str, line: str) -> None:
        """Hand over an alarm."""
        self._put(lambda: self._unless_there(step, lambda: self._sink.alert(step, name, line)))

    def close(self) -> None:
        """Let the thread end when all that was handed over is sent."""
        self._put(None)

    def join(self, timeout: float) -> None:
        """Wait for the end after `close`, at most so many seconds."""
        if self._off.is_set():
            return
        self._thread.join(max(timeout, 0.0))
        if self._thread.is_alive():
            self._switch_off("it did not finish in time")
        elif self._farewell is not None:
            self._tell(self._farewell)

    def _put(self, call: Callable[[], object] | None) -> None:
        if self._off.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._switch_off(f"{_MAX_WAITING_CALLS} rows are waiting to be sent")

    def _unless_there(self, step: int, call: Callable[[], None]) -> None:
        if step > self._last:
            call()

    def _work(self) -> None:
        """Start the sink, send what arrives, and close it."""
        try:
            self._last = self._sink.start(self._resumed_at)
            for row in self._history:
                metrics = {name: value for name, value in row.items() if name not in ("step", "time")}
                if row["step"] > self._last:
                    self._sink.log(row["step"], metrics, datetime.fromisoformat(row["time"]).timestamp())
            while (call := self._calls.get()) is not None and not self._off.is_set():
                call()
            self._farewell = self._sink.finish()
        except Exception as error:  # noqa: BLE001  training continues whatever fails here
            lines = str(error).splitlines()
            self._switch_off(lines[0] if lines else type(error).__name__)

    def _switch_off(self, why: str) -> None:
        with self._off_lock:
            if self._off.is_set():
                return
            self._off.set()
        for name in _SECRETS:
            if secret := os.environ.get(name):
                why = why.replace(secret, "…")
        why = re.sub(r"//[^/@\s]*@", "//…@", why)  # user and password of an address
        self._tell(f"{self._sink.title} is off for this attempt: {why}")


def finish(threads: Sequence[SinkThread], timeout: float = _FINISH_TIMEOUT_S) -> None:
    """Close all, waiting at most ``timeout`` seconds together for what is still to be sent."""
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.close()
    for thread in threads:
        thread.join(deadline - time.monotonic())


def check_installed(sinks: Sequence[str]) -> None:
    """Refuse a sink whose library is missing."""
    for sink in sinks:
        if find_spec(sink) is None:
            raise PreflightError(f"{sink} is not installed", "tracking.sinks", f"pip install 'rlhf-pipeline[{sink}]'")


def start_sinks(
    names: Sequence[str],
    stage: TrackedStage,
    history: Sequence[Mapping[str, Any]],
    resumed_at: int,
    tell: Callable[[str], None],
) -> list[SinkThread]:
    """Start the sinks, each on its thread; a W&B that is "disabled" is none."""
    # Each imports its library when it starts.
    from rlhf.tracking.mlflow_sink import MlflowSink
    from rlhf.tracking.tensorboard_sink import TensorBoardSink
    from rlhf.tracking.trackio_sink import TrackioSink
    from rlhf.tracking.wandb_sink import WandbSink

    made: dict[str, Callable[[TrackedStage], Sink]] = {
        "wandb": WandbSink,
        "tensorboard": TensorBoardSink,
        "mlflow": MlflowSink,
        "trackio": TrackioSink,
    }
    wanted = [name for name in dict.fromkeys(names) if name != "wandb" or stage.mode != "disabled"]
    return [SinkThread(made[name](stage), history, resumed_at, tell) for name in wanted]
