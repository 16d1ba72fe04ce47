"""W&B for real, offline. Each case runs in a process of its own, because wandb's service belongs to a whole process."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
from rlhf.tracking import MetricsLog, TrackedStage, finish, read_metrics, start_sinks

folder = Path(sys.argv[1])
lines = []
arguments = dict(project="tiny", pipeline="tiny", group="run-1", name="ppo", key="f00d" * 16, attempt=folder,
                 folder=folder / "shared", config={"lr": 1e-5}, result=("policy", "s3://bucket/actions/f00d.json"),
                 inputs={"sft": ("policy", "rlhf-store:/s/sft.json")})

def start(history=(), resumed_at=0, sinks=("wandb",), **changes):
    (sink,) = start_sinks(sinks, TrackedStage(**{**arguments, **changes}), history, resumed_at, lines.append)
    return sink

def sent():  # what the user was told, without the command that sends an offline run
    return [line for line in lines if "wandb sync" not in line]
"""


def output_of(folder: Path, body: str, **environment: str) -> tuple[str, str]:
    """Run a program; return its standard output and error."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {"HOME": str(folder.parent), "WANDB_CONFIG_DIR": str(folder.parent / "wandb-config")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + body, str(folder)],
        env=clean | home | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def run_program(folder: Path, body: str, **environment: str) -> Any:
    """Run a program that prints one JSON document last; nothing but that may reach its output, wandb's noise least."""
    out, err = output_of(folder, body, **environment)
    assert err == ""
    (line,) = out.splitlines()
    return json.loads(line)


def records(path: Path) -> list[Any]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format (32 KiB blocks of checked fragments)."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found: list[Any] = []
    fragments = b""
    position = 7
    while position < len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        fragments += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of one
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]  made at import
            record.ParseFromString(fragments)
            found.append(record)
            fragments = b""
    return found


def history(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def started_run(path: Path) -> Any:
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")


def test_an_online_run_that_is_continued_has_its_inputs_and_no_step_twice(tmp_path: Path):
    """W&B's server says what the last step was. There is no server here: its run is a stand-in."""
    body = """
import wandb
from unittest.mock import Mock
run = Mock(offline=False, resumed=True, summary={"step": 2})
wandb.init, wandb.login = Mock(return_value=run), Mock(return_value=True)
sink = start([{"step": 1, "time": "2025-01-01T00:00:00.000+00:00", "loss": 1.0}], 1, mode="online")
for step in (2, 3):
    sink.log(step, {"loss": 1.0})
finish([sink])
used, made = run.use_artifact.call_args.args[0], run.log_artifact.call_args.args[0]
names = [artifact.name for artifact in (used, made)]
print(json.dumps([names, [call.args[0] for call in run.log.call_args_list], lines]))
"""
    names, rows, told = run_program(tmp_path / "attempt", body)
    assert names == ["tiny-sft", "tiny-ppo"]
    assert rows == [{"step": 3, "loss": 1.0}]
    assert told == []


def test_a_folder_that_cannot_be_written_costs_one_line_and_no_metric(tmp_path: Path):
    """Training and the metrics file go on as if W&B had never been asked for."""
    (tmp_path / "file").write_text("in the way")
    body = """
log, run = MetricsLog(folder.parent.parent / "metrics.jsonl"), start()
for step in range(3):
    log.log(step, {"loss": 1.0})
    run.log(step, {"loss": 1.0})
    time.sleep(0.05)
finish([run])
print(json.dumps(sent()))
"""
    (line,) = run_program(tmp_path / "file" / "attempt", body, HOME=str(tmp_path), WANDB_CONFIG_DIR=str(tmp_path))
    assert "Weights & Biases is off" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(
    ("environment", "why"),
    [({}, "no key"), ({"WANDB_API_KEY": "too-short"}, "API key"), ({"WANDB_API_KEY": "k" * 40}, "resume status")],
    ids=["no key", "malformed key", "no network"],
)
def test_online_without_a_key_or_a_network_costs_one_line(environment: dict[str, str], why: str, tmp_path: Path):
    """What is wrong on the way to W&B is said once, without the key, and logging goes on into nothing."""
    body = """
import rlhf.tracking.wandb_sink as module
module._INIT_TIMEOUT_S = 1.0
run = start(mode="online")
run.log(1, {"loss": 1.0})
finish([run])
run.log(2, {"loss": 1.0})
print(json.dumps(sent()))
"""
    # Port 9 of this machine: nobody listens there, which is what no network looks like.
    (line,) = run_program(tmp_path / "attempt", body, WANDB_BASE_URL="http://127.0.0.1:9", **environment)
    assert why in line
    assert all(secret not in line for secret in environment.values())


def test_no_file_of_a_run_holds_the_key(tmp_path: Path):
    """The key is read from the environment and goes nowhere but to the server."""
    key = "0123456789abcdef" * 3
    body = 'run = start(mode="offline")\nrun.log(1, {"loss": 1.0})\nfinish([run])\nprint(json.dumps(sent()))'
    run_program(tmp_path / "attempt", body, WANDB_API_KEY=key)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert all(key.encode() not in path.read_bytes() for path in written)


@pytest.mark.parametrize("rows", [3, 30_000])
def test_a_wandb_that_does_not_answer_never_holds_training_up(rows: int, tmp_path: Path):
    """Its service stands still, the queue fills up: logging stays quick, finishing ends, and one line says why."""
    body = f"""
rows = {rows}
"""
    body += """
run = start()
run.log(0, {"loss": 1.0})
def service():
    children = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True)
    return children.stdout.split()
deadline = time.monotonic() + 30
while not (list(folder.glob("wandb/*/run-*.wandb")) and service()) and time.monotonic() < deadline:
    time.sleep(0.05)
(process,) = map(int, service())
os.kill(process, signal.SIGSTOP)
def give_up():
    os.kill(process, signal.SIGKILL)
    os._exit(1)
watchdog = threading.Timer(15, give_up)
watchdog.daemon = True
watchdog.start()
began = time.monotonic()
for step in range(rows):
    run.log(step, {"loss": 1.0})
finish([run], 0.5)
seconds = time.monotonic() - began
os.kill(process, signal.SIGKILL)
print(json.dumps({"seconds": seconds, "lines": lines}), flush=True)
os._exit(0)  # wandb's own farewell would wait for the service that is gone
"""
    # A process that the killed service had begun may say in standard error that nobody reads what it found.
    out, _ = output_of(tmp_path / "attempt", body)
    result = json.loads(out)
    assert result["seconds"] < 5
    assert len(result["lines"]) == 1


def test_disabled_means_that_nothing_is_imported_or_written(tmp_path: Path):
    """A user who wants no W&B pays nothing for it."""
    body = """
sinks = start_sinks(["wandb"], TrackedStage(**arguments, mode="disabled"), [], 0, lines.append)
print(json.dumps([sinks, "wandb" in sys.modules]))
"""
    assert run_program(tmp_path / "attempt", body) == [[], False]
    assert not (tmp_path / "attempt").exists()
