"""Training itself, with a rank killed at any moment: sft, rm and ppo with real parts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.attempt.folder import MARKER, AttemptFolder, Pulse
from rlhf.pipeline.plan import Planned
from rlhf.store import Store
from tests.buckets import Bucket
from tests.faults.running import moment
from tests.pipeline.helpers import kill_alone, until
from tests.small import TINY, TWO_RANKS, Pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the unbroken run is the first one's
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EVERY = {"ppo": 1, "rm": 2, "sft": 2}
"""Steps between checkpoints, as ``tests.small`` has them."""
LONGEST = 4.0
"""Seconds from a rank's begin, within which it is killed; some are done by then."""


def has_checkpoint(work: Path) -> bool:
    return any(work.glob("*/checkpoints/checkpoint-*/complete.json"))


class Killer(threading.Thread):
    """Kills a rank once, and notes every step that it sees any process of that rank finish.

    ``after`` is how many seconds after the rank's begin; None is the first complete checkpoint.
    """

    def __init__(self, work: Path, rank: int, after: float | None) -> None:
        super().__init__(daemon=True)
        self._work, self._rank, self._after = work, rank, after
        self.seen: list[Pulse] = []
        self.killed: int | None = None
        self.over = threading.Event()

    def run(self) -> None:
        begun: float | None = None
        while not self.over.wait(0.01):
            for attempt in self._work.glob("*"):
                if (found := AttemptFolder(attempt).pulses().get(self._rank)) is not None and found not in self.seen[
                    -1:
                ]:
                    self.seen.append(found)
            if not self.seen:
                continue
            begun = time.monotonic() if begun is None else begun
            due = has_checkpoint(self._work) if self._after is None else time.monotonic() - begun >= self._after
            if self.killed is None and due:
                self.killed = self.seen[-1].pid
                if self.seen[-1].is_here():
                    os.kill(self.killed, signal.SIGKILL)

    def repeated(self) -> int:
        """How many steps were done again, at most as many as there were."""
        before = [one.step for one in self.seen if one.pid == self.killed and one.step is not None]
        after = [one.step for one in self.seen if one.pid != self.killed and one.step is not None]
        return max(0, before[-1] - after[0] + 1) if before and after else 0


@pytest.mark.rounds(3, 60)
def test_a_rank_killed_at_any_moment_costs_at_most_one_interval(
    seed: int,
    pipeline: Pipeline,
    unbroken: dict[str, Planned],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The group goes on from its newest checkpoint, and what it makes equals an unbroken run's, bit for bit."""
    # Of every twelve seeds each is another stage, number of ranks, and kind of moment.
    stage, ranks, at_checkpoint = tuple(EVERY)[seed % 3], 2 - seed // 3 % 2, (seed % 3 == 0) == (seed // 6 % 2 == 0)
    source: Store | None = None
    planned = unbroken
    if ranks == 2:
        source, planned = request.getfixturevalue("two_ranks")
    record = planned[stage].record
    assert record is not None
    store = pipeline.fresh_store(tmp_path / "store", stage, source=source)
    after = None if at_checkpoint else moment(seed, LONGEST)
    killer = Killer(store.root / "work" / record.key, random.Random(seed).randrange(ranks), after)
    killer.start()
    again = pipeline.run(stage, store=store, settings=TWO_RANKS if ranks == 2 else (), checked=False)
    killer.over.set()
    killer.join()
    result = again[stage].record
    assert result is not None
    assert result.artifact == record.artifact
    assert killer.repeated() <= EVERY[stage]
    assert not at_checkpoint or "starting again from the newest checkpoint (1 of 3)" in pipeline.output.getvalue()
    assert "(raylet)" not in capsys.readouterr().out  # Ray's own account, which says less in more words


@pytest.mark.rounds(0, 10)
def test_a_killed_rank_that_only_scores_is_started_again_with_its_group(
    seed: int, pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path: Path
):
    """It has no part in the checkpoint, and the group goes on from that with the metrics of one rank's unbroken run."""
    record = unbroken["ppo"].record
    assert record is not None
    store = pipeline.fresh_store(tmp_path / "store", "ppo")
    killer = Killer(store.root / "work" / record.key, 1, after=moment(seed, LONGEST) if seed else None)
    killer.start()
    apart = ("ppo.placement=apart", "ppo.workers.count=2")
    result = pipeline.run("ppo", store=store, settings=apart, checked=False)["ppo"].record
    killer.over.set()
    killer.join()
    assert "rank 1 of ppo died without a word" in pipeline.output.getvalue()
    assert seed or "starting again from the newest checkpoint (1 of 3)" in pipeline.output.getvalue()
    assert result is not None
    assert result.key == record.key  # where models are is no part of what is made
    assert result.metrics == pytest.approx(record.metrics, abs=1e-4)


@pytest.mark.rounds(0, 10)
def test_a_driver_killed_in_mid_training_is_taken_over(
    seed: int, pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path: Path
):
    """The next run goes on from the checkpoint, keeps the metrics before it, and makes the same result."""
    stage = tuple(EVERY)[seed % 3]
    record = unbroken[stage].record
    assert record is not None
    store = pipeline.fresh_store(tmp_path / "store", stage)
    work = store.root / "work" / record.key
    kill_driver(pipeline, stage, store, lambda: has_checkpoint(work), moment(seed, 2))
    result = pipeline.run(stage, store=store)[stage].record
    assert result is not None
    assert result.artifact == record.artifact
    first = (work / result.attempt / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["step"] == 1


@pytest.mark.rounds(0, 6)
def test_a_stage_whose_machine_is_lost_in_mid_training_goes_on_from_the_bucket(
    seed: int, pipeline: Pipeline, unbroken: dict[str, Planned], bucket: Bucket, tmp_path: Path
):
    """The driver is killed and its scratch folder is gone; what it had uploaded gives the same result elsewhere."""
    stage = tuple(EVERY)[seed % 3]
    record = unbroken[stage].record
    assert record is not None
    lost = pipeline.fresh_store(tmp_path / "lost", stage, address=bucket.uri)
    uploaded = f"work/{record.key}/"
    kill_driver(
        pipeline, stage, lost, lambda: any(one.endswith(MARKER) for one in bucket.names(uploaded)), moment(seed, 1)
    )
    shutil.rmtree(tmp_path / "lost")
    store = Store.open(bucket.uri, scratch=tmp_path / "new")
    was_done = store.lookup(record.key) is not None  # on a fast machine, in some rounds
    result = pipeline.run(stage, store=store)[stage].record
    assert was_done or f"{stage}: fetched the checkpoint of step " in pipeline.output.getvalue()
    assert result is not None
    assert result.artifact == record.artifact


def kill_driver(pipeline: Pipeline, stage: str, store: Store, begun: Callable[[], bool], after: float) -> None:
    """Run a stage by a program of its own, and kill that a while after something happened."""
    words = (*pipeline.overrides(), f"store.uri={store.address}")
    if store.bucket is not None:
        words = (*words, f"store.scratch={store.root}")
    command = [sys.executable, "-m", "rlhf", "run", stage, "--config", str(TINY), *words]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: begun() or driver.poll() is not None, "a checkpoint", 120)
    assert driver.poll() is None, driver.communicate()
    kill_alone(driver, after)
