"""MLflow: the server that ``MLFLOW_TRACKING_URI`` names, or ``mlflow.db`` in the folder that all runs share.

The run is found again by a tag with the attempt's key. A row and its step, a metric as well, are one transaction: a
kill leaves both or none. MLflow has no histograms. Its databases keep infinite numbers as the largest finite ones.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rlhf.tracking.sinks import NOTHING, Bins, TrackedStage

_KEY = "rlhf.key"
_LONGEST_PARAMETER = 500
_PARAMETERS_AT_ONCE = 100


class MlflowSink:
    """See the module."""

    title = "MLflow"

    def __init__(self, stage: TrackedStage) -> None:
        self._stage = stage

    def start(self, _resumed_at: int) -> int:
        """Start or continue the run."""
        # By default a request to a server that does not answer is repeated for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # Its makers would be told how it is used.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        stage = self._stage
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if local := address is None:
            stage.folder.mkdir(parents=True, exist_ok=True)
            address = f"sqlite:///{stage.folder / 'mlflow.db'}"
        self._metric: Any = Metric
        self._client = client = MlflowClient(address, registry_uri=address)
        if client.get_experiment_by_name(stage.project) is None:
            with suppress(MlflowException):  # another stage has made it since
                client.create_experiment(stage.project, str(stage.folder / "mlartifacts") if local else None)
        experiment = client.get_experiment_by_name(stage.project)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], f"tags.`{_KEY}` = '{stage.key}'", max_results=1)
        if runs:
            self._run = str(runs[0].info.run_id)
            client.update_run(self._run, status="RUNNING")
            return int(runs[0].data.metrics.get("step", NOTHING))
        tags = {_KEY: stage.key, "rlhf.group": stage.group}
        self._run = str(client.create_run(experiment.experiment_id, tags=tags, run_name=stage.run).info.run_id)
        values = {name: json.dumps(value)[:_LONGEST_PARAMETER] for name, value in stage.config.items()}
        parameters = [Param(name, value) for name, value in values.items()]
        for first in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            client.log_batch(self._run, params=parameters[first : first + _PARAMETERS_AT_ONCE])
        return NOTHING

    def log(self, step: int, metrics: Mapping[str, float], at: float) -> None:
        """Send a row."""
        row = {"step": step, **metrics}
        self._client.log_batch(self._run, [self._metric(name, row[name], int(at * 1000), step) for name in row])

    def distributions(self, _step: int, _bins: Bins) -> None:
        """Send nothing: MLflow has no histograms."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Send a file of JSON lines."""
        names = ("prompt", "response", "score", "ended")
        lines = [json.dumps({name: row[name] for name in names}, ensure_ascii=False) + "\n" for row in rows]
        self._client.log_text(self._run, "".join(lines), f"samples/{step:06}.jsonl")

    def alert(self, step: int, name: str, line: str) -> None:
        """Tag the run."""
        self._client.set_tag(self._run, f"alarm.{name}", f"step {step}: {line}")

    def finish(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)
