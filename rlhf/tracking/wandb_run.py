"""A Weights & Biases run that can never disturb the training it reports on.

One background thread makes all calls of ``wandb``: starting takes seconds, or its whole time limit where there is no
network, and a stuck ``wandb`` blocks its caller without end. Training only puts metrics into a queue. At the first
failure the run reports it in one line and stays off.

A restarted attempt continues the same run: the run's id comes from the attempt's key and ``resume`` is "allow". W&B's
own step counter only moves forward, but a run resumed from a checkpoint repeats steps, so each row carries its
``step`` as a metric and W&B draws every other metric over it. Offline, each start writes one more folder with the
same id.
"""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

WandbMode = Literal["auto", "online", "offline", "disabled"]

# A row is a few hundred bytes and comes every few seconds: a queue of this length means that the thread is stuck.
_MAX_WAITING_ROWS = 10_000
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 60.0


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
            "id": run_id(attempt_key),
            "resume": "allow",
            "config": dict(config),
            "dir": folder,
        }
        self._rows: queue.Queue[dict[str, float] | None] = queue.Queue(_MAX_WAITING_ROWS)
        self._off = threading.Event()
        self._off_lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if mode == "disabled":
            self._off.set()
        else:
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over one row; returns at once, whatever wandb is doing."""
        self._put({"step": step, **metrics})

    def finish(self, *, timeout: float = _FINISH_TIMEOUT_S) -> None:
        """Close the run, waiting at most ``timeout`` seconds for the rows that are still to be sent."""
        if self._off.is_set():
            return
        self._put(None)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._switch_off(f"it did not finish within {timeout:.0f} s")

    def _put(self, row: dict[str, float] | None) -> None:
        if self._off.is_set():
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._switch_off(f"{_MAX_WAITING_ROWS} rows are waiting to be sent")

    def _work(self) -> None:
        """Start the run, log the rows that arrive, and close it; on the background thread."""
        try:
            run = self._start()
            while (row := self._rows.get()) is not None and not self._off.is_set():
                run.log(row)
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


def run_id(attempt_key: str) -> str:
    """Return the W&B id of an attempt: the same after every restart, and made of characters that W&B allows."""
    return hashlib.sha256(attempt_key.encode()).hexdigest()[:16]
