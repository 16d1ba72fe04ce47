"""All sinks of a stage that is killed twice, each read back by its own library and compared with metrics.jsonl."""

import json
import math
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import PreflightError
from rlhf.tracking import check_installed, read_metrics
from tests.tracking.test_wandb_run import history, output_of

SINKS = [name for name in ("wandb", "tensorboard", "mlflow", "trackio") if find_spec(name)]

# The sinks have more than the checkpoint at the first kill, and less at the second.
KILLED_TWICE = f"""
import torch.utils.tensorboard, {", ".join(SINKS)}
log = MetricsLog(folder / "metrics.jsonl")

def attempt(resumed_at, steps, received):
    log.rewind(resumed_at)
    sinks = start_sinks({SINKS}, TrackedStage(**arguments), read_metrics(log.path), resumed_at, lines.append)
    for step in steps:
        value = [0.1, float("nan"), float("inf"), -float("inf"), 1e-300, 3, -2.5, 2**53][step - 1]
        row = {{"objective/kl": value, "num_tokens": 20_000_001 * step}}
        log.log(step, row)
        if step <= received:
            for sink in sinks:
                sink.log(step, row)
    return sinks

def killed(*arguments):
    if os.fork() == 0:
        sinks = attempt(*arguments)
        while not all(sink._calls.empty() for sink in sinks):
            time.sleep(0.01)
        time.sleep(0.8)  # trackio sends every half a second
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()

log.rewind(0)
killed(0, range(1, 6), 5)
killed(3, range(4, 8), 4)
sinks = attempt(6, range(7, 9), 8)
for sink in sinks:
    sink.samples(8, [{{"prompt": "p", "response": "a\\x1b[31m\\u202eb", "score": 1.0, "ended": True}}])
    sink.distributions(8, {{"scores": ([1, 2], [0.0, 0.5, 1.0])}})
    sink.alert(8, "eos", "no response ends")
finish(sinks)
left = {{}}
"""
END = "\nprint(json.dumps([sent(), left]))"

# The accumulator that TensorBoard's own plugins read.
TENSORBOARD = """
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
(run,) = (folder / "shared" / "tensorboard" / "run-1").iterdir()
read = EventAccumulator(str(run), {"tensors": 0}).Reload()
points = [[event.step, name, repr(make_ndarray(event.tensor_proto).item())]
          for name in read.PluginTagToContent("scalars") for event in read.Tensors(name)]
texts = {name: [make_ndarray(event.tensor_proto).item().decode() for event in read.Tensors(name)]
         for name in read.PluginTagToContent("text")}
left["tensorboard"] = points, [event.step for event in read.Tensors("scores")], texts
"""

MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{folder / 'shared' / 'mlflow.db'}", registry_uri="")
experiment = client.get_experiment_by_name("tiny")
(run,) = client.search_runs([experiment.experiment_id])
points = [[m.step, name, repr(m.value)] for name in run.data.metrics
          for m in client.get_metric_history(run.info.run_id, name)]
left["mlflow"] = points, run.info.status, run.data.params, run.data.tags["alarm.eos"]
"""

TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("tiny")
rows = SQLiteStorage.get_logs("tiny", run)
points = [[row["step"], name, repr(float(row[name]))]
          for row in rows for name in ("objective/kl", "num_tokens") if name in row]
traces = [trace["messages"][-1]["content"] for trace in SQLiteStorage.get_traces("tiny", run)]
left["trackio"] = points, [row["scores"]["values"] for row in rows if "scores" in row], traces
"""
READ = {"tensorboard": TENSORBOARD, "mlflow": MLFLOW, "trackio": TRACKIO}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The attempt's folder, and what each sink has."""
    folder = tmp_path_factory.mktemp("sinks") / "attempt"
    body = KILLED_TWICE + "".join(READ.get(name, "") for name in SINKS) + END
    out, _ = output_of(folder, body)
    told, by_sink = json.loads(out.splitlines()[-1])
    assert told == []
    return folder, by_sink


def expected(folder: Path, shown: Callable[[float], float] = float) -> list[tuple[int, str, str]]:
    """The points of metrics.jsonl."""
    rows = read_metrics(folder / "metrics.jsonl")
    return sorted(
        (row["step"], name, repr(shown(value)))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    )


def in_order(points: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    return sorted((step, name, repr(float(value))) for step, name, value in points)


def clamped(value: float) -> float:
    """MLflow's databases have no infinite numbers."""
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else float(value)


def test_wandb_has_every_point_once(left: tuple[Path, dict[str, Any]]):
    """The last offline folder is the whole run."""
    folder, _ = left
    *_, last = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    names = ("objective/kl", "num_tokens")
    points = [(row["step"], name, row[name]) for row in history(last) for name in names if name in row]
    assert in_order(points) == expected(folder)


def test_tensorboard_has_every_point_once(left: tuple[Path, dict[str, Any]]):
    """In double precision, with histograms and texts."""
    folder, by_sink = left
    points, histograms, texts = by_sink["tensorboard"]
    assert in_order(points) == expected(folder)
    assert histograms == [8]
    assert texts["alarm/eos/text_summary"] == ["    no response ends"]
    (samples,) = texts["samples/text_summary"]
    assert json.loads(samples)["response"] == "a\x1b[31m\u202eb"


def test_mlflow_has_every_point_once(left: tuple[Path, dict[str, Any]]):
    """In one run, which is finished and has the settings and samples."""
    folder, by_sink = left
    points, *rest = by_sink["mlflow"]
    assert in_order([point for point in points if point[1] != "step"]) == expected(folder, clamped)
    assert rest == ["FINISHED", {"lr": "1e-05"}, "step 8: no response ends"]
    (samples,) = folder.glob("shared/mlartifacts/*/artifacts/samples/*.jsonl")
    assert json.loads(samples.read_text())["response"] == "a\x1b[31m\u202eb"


def test_trackio_has_every_point_once(left: tuple[Path, dict[str, Any]]):
    """In one run, with a histogram, and a trace for each sample."""
    folder, by_sink = left
    if "trackio" not in SINKS:
        assert os.environ.get("CI") != "true"
        pytest.skip("trackio is not installed")
    points, histograms, traces = by_sink["trackio"]
    assert in_order(points) == expected(folder)
    assert histograms == [[1, 2]]
    assert traces == ["a\x1b[31m\u202eb"]


AWAY = f"""
import torch.utils.tensorboard, {", ".join(SINKS)}
arguments["folder"].write_text("in the way")
os.environ |= {{"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}}
log = MetricsLog(folder / "metrics.jsonl")
sinks = start_sinks({SINKS[1:]}, TrackedStage(**arguments), [], 0, lines.append)
slowest = 0.0
for step in range(1, 101):
    began = time.monotonic()
    for each in (log, *sinks):
        each.log(step, {{"loss": 1.0}})
    slowest = max(slowest, time.monotonic() - began)
    time.sleep(0.01)
finish(sinks)
print(json.dumps([slowest, lines]))
"""


def test_a_sink_that_cannot_write_or_be_reached_costs_one_line(tmp_path: Path):
    """Files lie where TensorBoard and trackio would make folders; nobody listens where MLflow's server should be."""
    (tmp_path / "attempt").mkdir()
    out, _ = output_of(tmp_path / "attempt", AWAY)
    slowest, told = json.loads(out.splitlines()[-1])
    assert sorted(line.partition(" is off for this attempt: ")[0] for line in told) == ["MLflow", "TensorBoard"]
    assert slowest < 0.5
    assert len(read_metrics(tmp_path / "attempt" / "metrics.jsonl")) == 100


def test_a_sink_without_its_library_is_refused_before_the_run():
    """With the command that installs it."""
    with pytest.raises(PreflightError) as refused:
        check_installed(["wandb", "no_such_sink"])
    assert refused.value.next_step == "pip install 'rlhf-pipeline[no_such_sink]'"
