"""The driver killed, told to end and interrupted, at any moment."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rlhf.cluster.session import Session
from rlhf.training.checkpoint_writer import newest_complete, step_of
from tests.faults.running import Toy, expected_total, moment, seconds_until_gone
from tests.pipeline.helpers import (
    end,
    install_toys,
    kill_alone,
    marked,
    outliving,
    planned,
    start,
    states,
    until,
    write_pipeline,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def until_step(toy: Toy, driver: "subprocess.Popen[str]", step: int = 2) -> None:
    def begun() -> bool:
        assert driver.poll() is None, driver.communicate()
        rank = toy.rank(0)
        return rank is not None and (rank.step or 0) >= step

    until(begun, "the step", 120)


def cluster_of(seed: int, cluster: str, cpus: int) -> str:
    """For the first round the one of all tests, which goes on without the driver; then one that the driver starts."""
    return f"cluster.address={cluster}" if seed == 0 else f"cluster.cpus={cpus}"


@pytest.mark.rounds(1, 2)
def test_sigterm_saves_before_it_ends_a_run(seed: int, session: Session, cluster: str, toy: Toy, site: Path, mark: str):
    """Preemption costs no step: status 130, the command that goes on, a checkpoint of all ranks, no process left; and
    the next run goes on from there."""
    two = "steps.workers.count=2"
    words = (cluster_of(seed, cluster, 2), two, "steps.checkpoint_every=100", "steps.seconds=0.3")
    driver = start(site, "run", "steps", "--config", toy.path, *words, mark=mark)
    try:
        until_step(toy, driver)
        ranks = toy.ranks()
        assert len(ranks) == 2
        began = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        out, err = driver.communicate(timeout=60)
    finally:
        end(driver)
    assert driver.returncode == 130, out + err
    assert time.monotonic() - began < 25
    assert "starting again" not in out
    what, where, following = err.splitlines()
    saved = re.fullmatch(r"error: interrupted; saved at step (\d+); what was committed and the checkpoints stay", what)
    assert saved is not None, what
    assert where == f"  where: {toy.folder / 'store'}"
    assert following == f"  next:  rlhf run steps {' '.join(words)} --config {toy.path}"
    assert outliving(mark) == []
    assert [one for one in ranks if one.is_here()] == []
    assert list((toy.folder / "store" / "leases").iterdir()) == []
    newest = newest_complete(toy.attempts())
    assert newest is not None
    assert step_of(newest) == len(toy.done()) == int(saved[1]) < 12
    toy.run(session, two)
    assert toy.done() == list(range(12))
    assert toy.total() == expected_total()


@pytest.mark.rounds(1, 20)
def test_an_interrupted_group_ends_with_a_line(seed: int, cluster: str, toy: Toy, site: Path, mark: str):
    """Ctrl-C while its processes begin or train: no word of Ray's, no other Ray, and no process left."""
    driver = start(site, "run", "--config", toy.path, cluster_of(seed, cluster, 1), "steps.seconds=0.5", mark=mark)
    try:
        until(lambda: driver.poll() is not None or len(toy.attempts()) == 2, "the stage's start")
        if seed == 0:
            until_step(toy, driver, 1)
        else:
            time.sleep(moment(seed, 10))
        ranks = toy.ranks()
        began = time.monotonic()
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=60)
    finally:
        end(driver)
    assert driver.returncode == 130, err
    assert time.monotonic() - began < 15
    assert [line.split(":")[0].strip() for line in err.splitlines()] == ["error", "where", "next"], err
    assert outliving(mark) == []
    assert [one for one in ranks if one.is_here()] == []
    assert list((toy.folder / "store" / "leases").iterdir()) == []


@pytest.mark.rounds(0, 2)
def test_a_dead_drivers_ranks_are_gone_in_ten_seconds(
    seed: int, session: Session, cluster: str, toy: Toy, site: Path, mark: str
):
    """Also in a cluster that goes on without it; nobody else's work is touched, and the next run has the room."""
    driver = start(site, "run", "--config", toy.path, cluster_of(seed, cluster, 1), "steps.seconds=0.3", mark=mark)
    try:
        until_step(toy, driver)
        rank = toy.rank(0)
        assert rank is not None
        kill_alone(driver)
        seconds_until_gone([rank.pid], limit=10)
    finally:
        end(driver)
    assert outliving(mark) == []
    toy.run(session)
    assert toy.total() == expected_total()


@pytest.mark.rounds(0, 10)
def test_a_driver_killed_while_its_ranks_begin_leaves_none(seed: int, toy: Toy, site: Path, mark: str):
    """A process that has not reached its Ray yet does not look for it for a minute."""
    driver = start(site, "run", "--config", toy.path, "cluster.cpus=1", mark=mark)
    until(lambda: any(name.startswith("ray::Rank") for name in marked(mark).values()), "a group")
    kill_alone(driver, moment(seed, 2))
    assert outliving(mark) == []


@pytest.mark.rounds(1, 100)
def test_a_driver_killed_at_any_moment_loses_nothing_that_was_committed(
    seed: int, cluster: str, tmp_path: Path, mark: str
):
    """What had a result keeps it and is not made again; no process is left; no key has two results."""
    path = write_pipeline(tmp_path)
    site = install_toys(tmp_path / "toys")
    driver = start(site, "run", "--config", path, "cluster.cpus=1", mark=mark)
    kill_alone(driver, moment(seed, 10))
    assert outliving(mark) == []
    store = tmp_path / "store"
    before = {file.name: file.read_bytes() for file in (store / "actions").glob("*.json")} if store.exists() else {}
    again = start(install_toys(tmp_path / "again"), "run", "--config", path, cluster_of(seed, cluster, 1), mark=mark)
    try:
        out, err = again.communicate(timeout=60)
    finally:
        end(again)
    assert again.returncode == 0, out + err
    after = {file.name: file.read_bytes() for file in (store / "actions").glob("*.json")}
    assert before.items() <= after.items()
    assert len(after) == 3
    assert states(planned(path)) == {"words": "cached", "count": "cached", "total": "cached"}
    assert out.count(" cached ") == len(before)


@pytest.mark.rounds(3, 50)
def test_an_interrupt_in_the_first_half_second_is_quiet(seed: int, tmp_path: Path, mark: str):
    """While Python still imports the program: one line and status 130, no traceback."""
    path, site = write_pipeline(tmp_path), install_toys(tmp_path / "toys")
    # A shell without a terminal starts what it puts into the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if seed % 2 == 0 else signal.default_int_handler)
    try:
        driver = start(site, "run", "--config", path, "cluster.cpus=1", mark=mark)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        # Before Python itself is up a signal ends it without a word, or with one of Python's own.
        time.sleep(0.1 + moment(seed, 0.5))
        driver.send_signal(signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    finally:
        end(driver)
    assert driver.returncode == 130, out + err
    assert err.startswith("error: interrupted")
    assert "Traceback" not in out + err
    assert outliving(mark) == []
