"""Weights & Biases: a run online, or in the attempt's folder where there is no key.

The run's id comes from the attempt's key, and ``resume`` is "allow". W&B's own step counter counts calls, so each row
carries its ``step`` as a metric, and W&B draws every other metric over it; "episode" and "num_tokens" are axes too.
Offline, each start writes one more folder with the same id, which holds the metrics from the first step on.
"""

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.tracking.sinks import NOTHING, Bins, TrackedStage

_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 60.0
_COLUMNS = ("prompt", "response", "score", "ended")


class WandbSink:
    """See the module."""

    title = "Weights & Biases"

    def __init__(self, stage: TrackedStage) -> None:
        self._stage = stage

    def start(self, _resumed_at: int) -> int:
        """Start or continue the run; wandb prints, captures and copies nothing besides the metrics."""
        stage, folder = self._stage, self._stage.attempt
        # wandb would use the temporary folder in place of one that it cannot write.
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
        # Reports of wandb's own errors would go to the same server, and be logged where it refuses them.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        # Tables and artifacts of an offline run wait there: its usual place is the home, which has no part in it.
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))
        import wandb  # takes a second; only the rank that reports needs it

        wandb.setup(wandb.Settings(silent=True))
        mode = os.environ.get("WANDB_MODE") if stage.mode == "auto" else stage.mode
        if mode not in ("online", "offline", "disabled"):
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no key is configured: set WANDB_API_KEY or run `wandb login`")
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
        self._wandb: Any = wandb
        self._run: Any = wandb.init(
            project=stage.project,
            entity=stage.entity,
            group=stage.group,
            name=stage.name,
            # The same after every restart, and made of characters that W&B allows.
            id=hashlib.sha256(stage.key.encode()).hexdigest()[:16],
            resume="allow",
            config={**stage.config, "inputs": {name: address for name, (_, address) in stage.inputs.items()}},
            dir=folder,
            settings=settings,
        )
        for axis in ("step", "episode", "num_tokens"):
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline:  # offline W&B knows of no artifacts to use
            for name, (kind, address) in stage.inputs.items():
                self._run.use_artifact(self._artifact(name, kind, address))
        return int(self._run.summary.get("step", NOTHING)) if self._run.resumed else NOTHING

    def log(self, step: int, metrics: Mapping[str, float], _at: float) -> None:
        """Send a row; W&B stamps it with its own time."""
        self._run.log({"step": step, **metrics})

    def distributions(self, step: int, bins: Bins) -> None:
        """Send histograms."""
        drawn = {name: self._wandb.Histogram(np_histogram=each) for name, each in bins.items()}
        self._run.log({"step": step, **drawn})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a table."""
        data = [[str(row["prompt"]), row["response"], float(row["score"]), row["ended"]] for row in rows]
        self._run.log({"step": step, "samples": self._wandb.Table(list(_COLUMNS), data)})

    def alert(self, _step: int, name: str, line: str) -> None:
        """Send an alarm, which W&B passes on as its user wants alerts."""
        self._run.alert(title=f"alarm {name}", text=line)

    def finish(self) -> str | None:
        """Name the result and close the run."""
        kind, address = self._stage.result
        if address:
            self._run.log_artifact(self._artifact(self._stage.name, kind, address))
        self._run.finish(exit_code=0)
        if self._run.offline:
            folder = shlex.quote(str(self._run.settings.sync_dir))
            return f"Weights & Biases was offline; to send this run: wandb sync {folder}"
        return None

    def _artifact(self, instance: str, kind: str, address: str) -> Any:
        """Return an artifact that only refers to the store: its digest is that of the address, so it has one version
        for each result, and the output of a run is the input of the next.
        """
        artifact = self._wandb.Artifact(f"{self._stage.pipeline}-{instance}", kind)
        artifact.add_reference(address, name="record.json", checksum=False)
        return artifact
