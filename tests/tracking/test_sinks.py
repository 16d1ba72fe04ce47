"""All sinks of a stage that is killed twice, each read back by its own library and compared with metrics.jsonl."""

import hashlib
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
from tests.tracking.test_wandb_run import history, output_of, records

SINKS = [name for name in ("wandb", "tensorboard", "mlflow", "trackio") if find_spec(name)]

# What two kills leave: sinks that have more than the checkpoint, with a file that ends in mid-row, and sinks with less.
KILLED_TWICE = f"""
log = MetricsLog(folder / "metrics.jsonl")
log.rewind(0)

def attempt(resumed_at, steps, received):
    log.rewind(resumed_at)
    sinks = start_sinks({SINKS}, TrackedStage(**arguments), read_metrics(log.path), resumed_at, lines.append)
    for step in steps:
        value = [0.1, float("nan"), float("inf"), -float("inf"), 1e-300, 3, -2.5, 2**53][step - 1]
        row = {{"objective/kl": value, "num_tokens": 20_000_001 * step}}
        log.log(step, row)
        for sink in sinks if step <= received else ():
            sink.log(step, row)
    for sink in sinks if steps[-1] == 8 else ():
        prompt = [{{"role": "user", "content": "p"}}]
        sink.samples(8, [{{"prompt": prompt, "response": "a\\x1b[31m\\u202eb", "score": 1.0, "ended": True}}])
        sink.distributions(8, {{"scores": ([1, 2], [0.0, 0.5, 1.0])}})
        sink.alert(8, "eos", "no response ends")
    finish(sinks)

attempt(0, range(1, 6), received=5)
(events,) = folder.glob("shared/tensorboard/*/*/events*")
os.truncate(events, events.stat().st_size - 20)
attempt(3, range(4, 8), received=4)
attempt(6, range(7, 9), received=8)
left = {{}}
"""
# Files lie where folders would be made, and nobody listens where servers should be.
AWAY = f"""
arguments |= {{"folder": folder / "in the way", "key": "dead" * 16}}
arguments["folder"].touch()
os.environ |= {{"MLFLOW_TRACKING_URI": "http://user:s3cret@127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
               "TRACKIO_SERVER_URL": "http://127.0.0.1:9", "TRACKIO_WRITE_TOKEN": "t0ken"}}
told = list(lines)
sinks = start_sinks({SINKS[1:]}, TrackedStage(**arguments), [], 0, lines.append)
slowest = 0.0
for step in range(1, 101):
    began = time.monotonic()
    for sink in sinks:
        sink.log(step, {{"loss": 1.0}})
    slowest = max(slowest, time.monotonic() - began)
    time.sleep(0.01)
finish(sinks)
left["away"] = slowest, lines[len(told):]
print(json.dumps([told, left]))
"""

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
    body = KILLED_TWICE + "".join(READ.get(name, "") for name in SINKS) + AWAY
    out, _ = output_of(folder, body)
    told, by_sink = json.loads(out.splitlines()[-1])
    runs = sorted(folder.glob("wandb/offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert told == [f"Weights & Biases was offline; to send this run: wandb sync {run}" for run in runs]
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


def wandb_files(left: tuple[Path, dict[str, Any]]) -> list[Path]:
    """The files of the attempts' offline runs, oldest first."""
    return sorted(left[0].glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def clamped(value: float) -> float:
    """MLflow's databases have no infinite numbers."""
    return math.copysign(sys.float_info.max, value) if math.isinf(value) else float(value)


def test_wandb_has_every_point_once(left: tuple[Path, dict[str, Any]]):
    """The last offline folder alone is the whole run, which has the same id as the others."""
    files = wandb_files(left)
    assert [path.name for path in files] == [f"run-{hashlib.sha256(b'f00d' * 16).hexdigest()[:16]}.wandb"] * 3
    names = ("objective/kl", "num_tokens")
    points = [(row["step"], name, row[name]) for row in history(files[-1]) for name in names if name in row]
    assert in_order(points) == expected(left[0])


def test_wandb_draws_every_metric_over_the_step(left: tuple[Path, dict[str, Any]]):
    """Its own counter is not the step of a resumed run; episodes and tokens are there to be chosen."""
    found = records(wandb_files(left)[-1])
    metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
    assert {metric.name for metric in metrics if metric.options.hidden} == {"step", "episode", "num_tokens"}
    assert {metric.step_metric for metric in metrics if not metric.options.hidden} == {"step"}


def test_wandb_has_samples_histograms_and_alarms(left: tuple[Path, dict[str, Any]]):
    """Read back from the offline run's files, at their step."""
    file = wandb_files(left)[-1]
    table, histogram = history(file)[-2:]
    assert (histogram["step"], table["step"]) == (8, 8)
    assert (histogram["scores/values"], histogram["scores/bins"]) == ([1, 2], [0, 0.5, 1])
    (kept,) = file.parent.glob("files/media/table/*.table.json")
    prompt = "[{'role': 'user', 'content': 'p'}]"
    assert json.loads(kept.read_text())["data"] == [[prompt, "a\x1b[31m\u202eb", 1.0, True]]
    (alert,) = (record.alert for record in records(file) if record.WhichOneof("record_type") == "alert")
    assert (alert.title, alert.text) == ("alarm eos", "no response ends")


def test_wandb_refers_to_the_result_and_inputs_in_the_store(left: tuple[Path, dict[str, Any]]):
    """In a group, without an upload. Offline W&B takes no inputs: they are in the settings."""
    found = records(wandb_files(left)[-1])
    made = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    references = {artifact.name: [entry.ref for entry in artifact.manifest.contents] for artifact in made}
    assert references["tiny-ppo"] == ["s3://bucket/actions/f00d.json"]
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.display_name) == ("tiny", "run-1", "ppo")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["inputs"] == {"sft": "rlhf-store:/s/sft.json"}


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


def test_a_sink_that_cannot_write_or_be_reached_costs_one_line(left: tuple[Path, dict[str, Any]]):
    """No step waits. trackio keeps the rows until its server is back."""
    slowest, told = left[1]["away"]
    assert sorted(line.partition(" is off for this attempt: ")[0] for line in told) == ["MLflow", "TensorBoard"]
    assert "s3cret" not in str(told)
    assert slowest < 1.0


def test_a_sink_without_its_library_is_refused_before_the_run():
    """With the command that installs it."""
    with pytest.raises(PreflightError) as refused:
        check_installed(["wandb", "no_such_sink"])
    assert refused.value.next_step == "pip install 'rlhf-pipeline[no_such_sink]'"
