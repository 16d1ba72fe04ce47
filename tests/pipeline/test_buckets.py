"""A pipeline whose store lies in a bucket."""

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.cluster.session import Session
from rlhf.config.pipeline import load_pipeline
from rlhf.errors import NextCommand, SettingsError, TryAgainError
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.runner import Runner
from rlhf.pipeline.stage import Stage
from rlhf.store import Store
from rlhf.terminal import Display
from rlhf.watching import VANISHED_SECONDS, Follower
from tests.buckets import Bucket
from tests.pipeline.helpers import THREE, end, load_toy, start, states
from tests.pipeline.stepping import KNOWN as STEPPING
from tests.pipeline.toys import KNOWN


@pytest.fixture
def written(bucket: Bucket, tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a pipeline file for a machine, by its name, with these stages."""

    def write(machine: str, stages: str) -> Path:
        path = tmp_path / f"{machine}.yaml"
        scratch = tmp_path / machine
        path.write_text(f"pipeline: toy\nstore: {{uri: {bucket.uri}, scratch: {scratch}}}\n{stages}")
        return path

    return write


def test_scratch_is_for_buckets_alone(tmp_path: Path):
    """A store in a folder has its attempts there; a scratch folder beside it would be left unused in silence."""
    path = tmp_path / "toy.yaml"
    path.write_text(f"store: {{uri: {tmp_path / 'store'}, scratch: {tmp_path / 'scratch'}}}\n{THREE}")
    with pytest.raises(SettingsError, match="scratch is for a store in a bucket") as caught:
        load_toy(path)
    assert f"{path}:1" in str(caught.value)


def run(session: Session, path: Path, known: Mapping[str, Stage] = KNOWN) -> tuple[dict[str, Planned], str]:
    """Run a pipeline in this process; the plan afterwards, and what the user saw."""
    config = load_pipeline(path, (), {name: stage.settings for name, stage in known.items()})
    text = io.StringIO()
    display = Display(Console(file=text, width=300), list(config.instances))
    store = Store.open(config.store.uri, scratch=config.store.scratch)
    return Runner(config, known, store, session, display).run(()), text.getvalue()


@pytest.mark.slow
def test_what_one_machine_made_is_cached_on_another(
    session: Session, bucket: Bucket, written: Callable[[str, str], Path], tmp_path: Path
):
    """The whole pipeline through a bucket: results, refs and logs are there, and the other machine makes nothing."""

    made, shown = run(session, written("first", THREE))
    assert states(made) == {"words": "cached", "count": "cached", "total": "cached"}
    assert shown.count(" done ") == 3
    assert sorted({name.split("/")[0] for name in bucket.files()}) == ["actions", "blobs", "manifests", "refs", "work"]
    total = made["total"].record
    assert total is not None
    assert f"work/{total.key}/{total.attempt}/log-0.txt" in bucket.names("work")
    found, shown = run(session, written("second", THREE))
    assert {name: one.record for name, one in found.items()} == {name: one.record for name, one in made.items()}
    assert shown.count(" cached ") == 3
    assert not (tmp_path / "second" / "work").exists()


class Watcher:
    """A third machine, which watches from the store alone, by a clock that a test moves on."""

    def __init__(self, path: Path) -> None:
        self._path, self.skipped, self.text = path, 0.0, io.StringIO()

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()

    def follow(self, looked: Callable[[], None]) -> None:
        """Watch to the end of a run; ``looked`` is called after each look."""

        def sleep(_: float) -> None:
            looked()
            time.sleep(0.1)

        def clock() -> float:
            return time.monotonic() + self.skipped

        config = load_pipeline(self._path, (), {name: stage.settings for name, stage in STEPPING.items()})
        store = Store.open(config.store.uri, scratch=config.store.scratch)
        display = Display(Console(file=self.text, width=300), list(config.instances), clock)
        Follower([], lambda: plan(config, STEPPING, store), store, display, clock).follow(sleep)


@pytest.mark.slow
def test_a_stage_whose_machine_was_lost_goes_on_elsewhere(
    session: Session, bucket: Bucket, written: Callable[[str, str], Path], tmp_path: Path
):
    """kill -9 of the driver, and an empty scratch folder: what had been uploaded is fetched, and no step repeated.

    Who watches from a third machine sees the steps, that nothing works on the stage any longer, and later its end.
    """
    info = tmp_path / "site" / "stepping-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stepping\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[rlhf.stages]\nstepping = tests.pipeline.stepping:STEPPING\n")
    gate = tmp_path / "gate"
    words = ("run", "cluster.cpus=1", f"stepping.gate={gate}", "--config", written("first", "stepping: {}\n"))
    watcher = Watcher(written("third", "stepping: {}\n"))
    driver = start(tmp_path / "site", *words)

    def kill_at_the_third_checkpoint() -> None:
        uploaded = any(name.endswith("checkpoint-3/complete.json") for name in bucket.names("work"))
        if driver.poll() is None and uploaded and any("step 3/4" in line for line in watcher.lines):
            os.kill(driver.pid, signal.SIGKILL)
            driver.communicate()
        elif driver.poll() is not None:
            watcher.skipped += 5.0

    try:
        with pytest.raises(TryAgainError, match="the run was interrupted or killed") as caught:
            watcher.follow(kill_at_the_third_checkpoint)
        assert driver.poll() == -signal.SIGKILL
    finally:
        end(driver)
        gate.touch()
    assert caught.value.next_command == NextCommand("run")
    assert watcher.skipped >= VANISHED_SECONDS
    again = threading.Thread(target=lambda: watcher.follow(lambda: None))
    again.start()
    found, shown = run(session, written("second", "stepping: {}\n"), STEPPING)
    again.join(60)
    assert watcher.lines[-1].split()[:2] == ["stepping", "done"]
    assert states(found) == {"stepping": "cached"}
    assert f"stepping: fetched the checkpoint of step 3 from {bucket.uri}" in shown
    (record,) = [json.loads(data) for data in bucket.files("actions").values()]
    assert record["metrics"] == {"first": 4.0}
    assert record["attempt"].startswith("000002-")
    assert not [name for name in bucket.names("work") if "/checkpoints/" in name]
