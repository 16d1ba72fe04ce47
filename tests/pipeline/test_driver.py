"""The program as a process: killed, interrupted, and two of it at once."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from rich.console import Console

from rlhf.cluster.session import Session
from rlhf.pipeline.documents import status_document
from rlhf.pipeline.runner import Runner
from rlhf.store import LEASE_SECONDS, Store
from rlhf.terminal import Display
from tests.pipeline.helpers import (
    end,
    kill_alone,
    load_toy,
    marked,
    outliving,
    planned,
    start,
    states,
    until,
    write_pipeline,
)
from tests.pipeline.toys import KNOWN

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """The last stage waits for this file; ``.started`` beside it tells that it runs."""
    gate = tmp_path / "gate"
    yield gate
    gate.touch()


def running(gate: Path) -> bool:
    return Path(f"{gate}.started").exists()


def run(session: Session, path: Path, *overrides: str) -> str:
    """Run the pipeline in this process; what the user saw."""
    config = load_toy(path, *overrides)
    text = io.StringIO()
    display = Display(Console(file=text, width=200), list(config.instances))
    Runner(config, KNOWN, Store.open(config.store.uri), session, display).run(())
    return text.getvalue()


def test_a_driver_killed_in_mid_stage_is_succeeded_at_once(
    session: Session, path: Path, gate: Path, site: Path, tmp_path: Path
):
    """kill -9: what was committed stays, the next run waits for no lease to expire, and no process is left behind."""
    mark = uuid4().hex
    driver = start(site, "run", "--config", path, f"total.gate={gate}", "cluster.cpus=1", mark=mark)
    try:
        until(lambda: running(gate) or driver.poll() is not None, "the stage's start")
        kill_alone(driver)
    finally:
        end(driver)
    store = Store.open(tmp_path / "store")
    found = planned(path)
    assert states(found) == {"words": "cached", "count": "cached", "total": "missing"}
    assert found["total"].key is not None
    assert store.holder(found["total"].key) is None
    status = status_document(load_toy(path), found, store)["stages"][-1]
    assert (status["state"], status["why"]) == ("missing", "new; 1 unfinished attempt(s)")

    began = time.monotonic()
    run(session, path)
    assert time.monotonic() - began < LEASE_SECONDS
    record = planned(path)["total"].record
    assert record is not None
    assert record.attempt.startswith("000002-")
    assert outliving(mark, 15) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_everything_and_says_how_to_go_on(
    path: Path, gate: Path, site: Path, tmp_path: Path, stop: signal.Signals
):
    """Status 130 and the command that continues; no traceback, no process, no lease, and what is done stays done."""
    mark = uuid4().hex
    driver = start(site, "run", "total", "--config", path, f"total.gate={gate}", "cluster.cpus=1", mark=mark)
    try:
        until(lambda: running(gate) or driver.poll() is not None, "the stage's start")
        if stop == signal.SIGINT:
            os.killpg(driver.pid, stop)  # as a terminal does: to the whole foreground group
        else:
            driver.send_signal(stop)
        out, err = driver.communicate(timeout=60)
    finally:
        end(driver)
    assert driver.returncode == 130, out + err
    assert err.splitlines() == [
        "error: interrupted; what was committed and the checkpoints stay",
        f"  where: {tmp_path / 'store'}",
        f"  next:  rlhf run total total.gate={gate} cluster.cpus=1 --config {path}",
    ]
    assert "Traceback" not in out
    until(lambda: not marked(mark), "the end of its processes", 15)
    assert list((tmp_path / "store" / "leases").iterdir()) == []
    assert states(planned(path)) == {"words": "cached", "count": "cached", "total": "missing"}


def test_a_second_interruption_ends_at_once(path: Path, gate: Path, site: Path):
    """Whatever the first one waits for: the same message and status, and no process left."""
    mark = uuid4().hex
    driver = start(site, "run", "total", "--config", path, f"total.gate={gate}", "cluster.cpus=1", mark=mark)
    try:
        until(lambda: running(gate) or driver.poll() is not None, "the stage's start")
        began = time.monotonic()
        for _ in range(2):
            driver.send_signal(signal.SIGINT)
            time.sleep(0.3)
        out, err = driver.communicate(timeout=15)
    finally:
        end(driver)
    assert driver.returncode == 130, out + err
    assert err.startswith("error: interrupted; what was committed and the checkpoints stay\n")
    assert time.monotonic() - began < 5
    assert outliving(mark, 15) == []


def test_of_two_drivers_one_works_and_the_other_waits_and_adopts(
    session: Session, cluster: str, path: Path, gate: Path, site: Path, tmp_path: Path
):
    """Two runs of one pipeline at once do the work once, and both succeed."""
    words = ("run", "--config", path, f"total.gate={gate}", f"cluster.address={cluster}")
    first = start(site, *words)
    try:
        until(lambda: running(gate) or first.poll() is not None, "the stage's start")
        store = Store.open(tmp_path / "store")
        found = planned(path)
        status = {one["stage"]: one for one in status_document(load_toy(path), found, store)["stages"]}
        assert {name: one["state"] for name, one in status.items()} == {
            "words": "cached",
            "count": "cached",
            "total": "running",
        }
        assert f"process {first.pid} of " in status["total"]["why"]

        second = start(site, *words)
        try:
            waiting = f"Waiting for process {first.pid}"
            assert second.stdout is not None
            seen: list[str] = []
            for line in second.stdout:
                seen.append(line)
                if waiting in line:
                    break
            assert seen[-1].startswith(f"total: {waiting}"), seen
            gate.touch()
            out, err = second.communicate(timeout=60)
        finally:
            end(second)
        assert second.returncode == 0, out + err
        adopted = [line for line in out.splitlines() if "made by another run" in line]
        assert len(adopted) == 1
        assert "Waiting" not in adopted[0]
        assert first.wait(60) == 0
    finally:
        end(first)
    record = planned(path)["total"].record
    assert record is not None
    assert [attempt.name for attempt in store.attempts(record.key)] == [record.attempt]
    assert list((tmp_path / "store" / "leases").iterdir()) == []


def finished(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        end(process)
    return process.returncode, out, err


def test_a_run_whose_group_can_never_start_is_refused_in_seconds(cluster: str, path: Path, site: Path, tmp_path: Path):
    """Status 2, three lines, and nothing was run."""
    path.write_text(path.read_text() + "group: {workers: {count: 50}}\n")
    status, out, err = finished(start(site, "run", "--config", path, f"cluster.address={cluster}"))
    assert status == 2, out + err
    assert err.splitlines() == [
        "error: group asks for 50 ranks of 1 CPU cores, and the cluster has 2 cores on 1 node(s)",
        "  where: group.workers",
        "  next:  group.workers.count=2",
    ]
    assert not (tmp_path / "store" / "work").exists()


def test_a_failed_stage_is_told_in_a_few_lines(cluster: str, path: Path, site: Path):
    """Status 1, no traceback, and the path of the log; with --debug the traceback too."""
    words = ("run", "--config", path, f"cluster.address={cluster}", "total.behaviour=raises")
    status, _, err = finished(start(site, *words, "--debug"))
    assert status == 1
    *trace, what, where, following = err.splitlines()
    assert trace[0].startswith("Traceback")
    assert what == "error: total failed: KeyError: 'no such thing'"
    assert "log-0.txt" in where
    assert following.startswith("  next:  less +G ")


def test_a_run_of_hits_starts_no_ray(session: Session, path: Path, site: Path):
    """What is done costs a look into the store; the summary names the artifact and what to do with it."""
    run(session, path)
    code = (
        "import json, sys\nfrom rlhf.cli.main import main\n"
        f"status = main(['run', '--config', {str(path)!r}])\n"
        "print(json.dumps([status, sorted({'ray', 'torch'} & set(sys.modules))]))"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert json.loads(answer.stdout.splitlines()[-1]) == [0, []]
    assert "rlhf generate total --config" in answer.stdout


def test_a_cluster_that_does_not_answer_is_a_reason_to_try_again(path: Path, site: Path):
    """Status 75 and the address, instead of waiting for ever."""
    status, _, err = finished(start(site, "run", "--config", path, "cluster.address=127.0.0.1:1"))
    assert status == 75
    assert "127.0.0.1:1" in err
    assert "ray status" in err
