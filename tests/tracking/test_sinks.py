"""Every sink read back by its own library, and compared with metrics.jsonl. Each in a process of its own."""

import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import PreflightError
from rlhf.tracking import check_installed, read_metrics
from tests.tracking.test_wandb_run import history, output_of

# The stage is killed twice after a checkpoint at step 3: when the sink has less than that, and when it has more.
KILLED_TWICE = """
log = MetricsLog(folder / "metrics.jsonl")
log.rewind(0)

def attempt(resumed_at, steps, received):
    log.rewind(resumed_at)
    sink = start(read_metrics(log.path), resumed_at, [SINK])
    for step in steps:
        value = [0.1, float("nan"), float("inf"), -float("inf"), 1e-300, 3, -2.5, 2**53][step - 1]
        rows = {"objective/kl": value, "num_tokens": 20_000_001 * step}, {"eval/loss": value}
        for row in rows:
            log.log(step, row)
            if step <= received:
                sink.log(step, row)
    if received < steps[-1]:
        return finish([sink])
    sink.samples(steps[-1], [{"prompt": "p", "response": "a\\x1b[31m\\u202eb", "score": 1.0, "ended": True}])
    sink.distributions(steps[-1], {"scores": ([1, 2], [0.0, 0.5, 1.0])})
    sink.alert(steps[-1], "eos", "no response ends")
    finish([sink])

attempt(0, range(1, 6), 2)
attempt(3, range(4, 7), 6)
attempt(3, range(4, 9), 8)
points = rest = None
"""
END = "\nprint(json.dumps([sent(), points, rest]))"

# The accumulator that TensorBoard's own plugins read.
TENSORBOARD = """
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
(run,) = (folder / "shared" / "tensorboard" / "run-1").iterdir()
read = EventAccumulator(str(run), {"tensors": 0}).Reload()
points = [[event.step, name, repr(make_ndarray(event.tensor_proto).item())]
          for name in read.PluginTagToContent("scalars") for event in read.Tensors(name)]
rest = [event.step for event in read.Tensors("scores")]
"""

MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{folder / 'shared' / 'mlflow.db'}", registry_uri="")
experiment = client.get_experiment_by_name("tiny")
(run,) = client.search_runs([experiment.experiment_id])
points = [[m.step, name, repr(m.value)] for name in run.data.metrics
          for m in client.get_metric_history(run.info.run_id, name)]
rest = [run.info.status, run.data.params, run.data.tags["alarm.eos"]]
"""

TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("tiny")
rows = SQLiteStorage.get_logs("tiny", run)
names = ("objective/kl", "num_tokens", "eval/loss")
points = [[row["step"], name, repr(float(row[name]))] for row in rows for name in names if name in row]
rest = [trace["messages"][-1]["content"] for trace in SQLiteStorage.get_traces("tiny", run)]
"""


def expected(folder: Path, shown: Callable[[float], float] = float) -> list[tuple[int, str, str]]:
    """The points of metrics.jsonl."""
    rows = read_metrics(folder / "metrics.jsonl")
    return sorted(
        (row["step"], name, repr(shown(value)))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    )


def killed_twice(sink: str, folder: Path, read: str = "") -> tuple[list[str], list[tuple[int, str, str]], Any]:
    """Run the program and one that reads the sink; return what the user was told, the points in order, and the rest."""
    out, _ = output_of(folder, KILLED_TWICE.replace("SINK", repr(sink)) + read + END)
    told, points, rest = json.loads(out.splitlines()[-1])
    return told, sorted((step, name, repr(float(value))) for step, name, value in points or []), rest


def clamped(value: float) -> float:
    """MLflow's databases have no infinite numbers."""
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else float(value)


def test_wandb_has_every_point_once(tmp_path: Path):
    """Of a stage that was killed twice the last offline folder is the whole run."""
    folder = tmp_path / "attempt"
    assert killed_twice("wandb", folder)[0] == []
    *_, last = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    names = ("objective/kl", "num_tokens", "eval/loss")
    points = [(row["step"], name, repr(float(row[name]))) for row in history(last) for name in names if name in row]
    assert sorted(points) == expected(folder)


def test_tensorboard_has_every_point_once(tmp_path: Path):
    """In double precision, in one run, with the histograms of steps that a restart kept."""
    folder = tmp_path / "attempt"
    told, points, histograms = killed_twice("tensorboard", folder, TENSORBOARD)
    assert told == []
    assert points == expected(folder)
    assert histograms == [8]


def test_mlflow_has_every_point_once(tmp_path: Path):
    """In one run, which is finished and has the settings."""
    folder = tmp_path / "attempt"
    told, points, rest = killed_twice("mlflow", folder, MLFLOW)
    assert told == []
    assert points == expected(folder, clamped)
    assert rest == ["FINISHED", {"lr": "1e-05"}, "step 8: no response ends"]
    (samples, *_) = sorted(folder.glob("shared/mlartifacts/*/artifacts/samples/*.jsonl"))
    assert json.loads(samples.read_text())["response"] == "a\x1b[31m\u202eb"


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio wants an older pillow than the one that we test with")
def test_trackio_has_every_point_once(tmp_path: Path):
    """In one run, with a trace for each sample."""
    folder = tmp_path / "attempt"
    told, points, traces = killed_twice("trackio", folder, TRACKIO)
    assert told == []
    assert points == expected(folder)
    assert set(traces) == {"a\x1b[31m\u202eb"}


@pytest.mark.parametrize("sink", ["tensorboard", "mlflow"])
def test_a_sink_that_cannot_write_costs_one_line(sink: str, tmp_path: Path):
    """Training goes on; the user is told once."""
    (tmp_path / "attempt").mkdir()
    (tmp_path / "attempt" / "shared").write_text("in the way")
    told, *_ = killed_twice(sink, tmp_path / "attempt")
    line, *again = told
    assert len(again) == 2  # once for each attempt
    assert " is off for this attempt: " in line
    assert len(read_metrics(tmp_path / "attempt" / "metrics.jsonl")) == 16


def test_a_sink_without_its_library_is_refused_before_the_run():
    """With the command that installs it."""
    with pytest.raises(PreflightError) as refused:
        check_installed(["wandb", "no_such_sink"])
    assert refused.value.next_step == "pip install 'rlhf-pipeline[no_such_sink]'"
