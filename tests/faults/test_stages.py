"""Training itself, with a rank killed at any moment: sft, rm and ppo with real parts."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf.pipeline.plan import Planned
from rlhf.pipeline.pulse import Pulse, pulses
from rlhf.store import Store
from tests.faults.running import moment
from tests.pipeline.helpers import until
from tests.small import TINY, TWO_RANKS, Pipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),  # the unbroken run is the first one's
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

EVERY = {"sft": 2, "rm": 2, "ppo": 1}
"""Steps between checkpoints, as ``tests.small`` has them."""
LONGEST = 8.0
"""Seconds from a rank's begin, within which it is killed; some are done by then."""


class Killer(threading.Thread):
    """Kills a rank once, and notes every step that it sees any process of that rank finish."""

    def __init__(self, work: Path, rank: int, after: float) -> None:
        super().__init__(daemon=True)
        self._work, self._rank, self._after = work, rank, after
        self.seen: list[Pulse] = []
        self.killed: int | None = None
        self.over = threading.Event()

    def run(self) -> None:
        begun: float | None = None
        while not self.over.wait(0.01):
            for attempt in self._work.glob("*"):
                if (found := pulses(attempt).get(self._rank)) is not None and found not in self.seen[-1:]:
                    self.seen.append(found)
            if not self.seen:
                continue
            begun = time.monotonic() if begun is None else begun
            if self.killed is None and time.monotonic() - begun >= self._after:
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
    seed: int, pipeline: Pipeline, unbroken: dict[str, Planned], request: pytest.FixtureRequest, tmp_path: Path
):
    """The group goes on from its newest checkpoint, and what it makes equals an unbroken run's, bit for bit."""
    stage = tuple(EVERY)[seed % 3]
    ranks = 1 if seed < 3 else random.Random(seed).choice((1, 2))
    source: Store | None = None
    planned = unbroken
    if ranks == 2:
        source, planned = request.getfixturevalue("two_ranks")
    record = planned[stage].record
    assert record is not None
    store = pipeline.fresh_store(tmp_path / "store", stage, source=source)
    killer = Killer(store.root / "work" / record.key, seed % ranks, moment(seed, LONGEST))
    killer.start()
    again = pipeline.run(stage, store=store, settings=TWO_RANKS if ranks == 2 else ())
    killer.over.set()
    killer.join()
    result = again[stage].record
    assert result is not None
    assert result.artifact == record.artifact
    assert killer.repeated() <= EVERY[stage]


@pytest.mark.rounds(0, 10)
def test_a_driver_killed_in_mid_training_is_taken_over(
    seed: int, pipeline: Pipeline, unbroken: dict[str, Planned], tmp_path: Path
):
    """The next run goes on from the checkpoint, keeps the metrics before it, and makes the same result."""
    stage = tuple(EVERY)[seed % 3]
    record = unbroken[stage].record
    assert record is not None
    store = pipeline.fresh_store(tmp_path / "store", stage)
    command = [sys.executable, "-m", "rlhf", "run", stage, "--config", str(TINY), *pipeline.overrides()]
    driver = subprocess.Popen([*command, f"store.uri={store.root}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    work = store.root / "work" / record.key
    until(
        lambda: any(work.glob("*/checkpoints/checkpoint-*/complete.json")) or driver.poll() is not None,
        "a checkpoint",
        120,
    )
    assert driver.poll() is None, driver.communicate()
    time.sleep(moment(seed, 2))
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    result = pipeline.run(stage, store=store)[stage].record
    assert result is not None
    assert result.artifact == record.artifact
    first = (work / result.attempt / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["step"] == 1
