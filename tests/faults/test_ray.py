"""Ray's own processes killed, and a node of its cluster lost."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.cluster.session import Session
from tests.faults.running import Toy, expected_total, moment
from tests.faults.test_drivers import until_step
from tests.pipeline.helpers import MARK, end, marked, outliving, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray's use of its own
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LEAN: dict[str, Any] = {"include_dashboard": False, "include_log_monitor": False}
"""Nodes without what nobody here looks at, and what takes a second of a core for each."""


def process_of(mark: str, name: str) -> int:
    """The one process of a test whose program or title ends so."""
    (pid,) = [pid for pid, program in marked(mark).items() if program.endswith(name)]
    return pid


@pytest.mark.rounds(0, 20)
def test_a_run_whose_ray_died_says_so_and_goes_on_when_it_is_run_again(
    seed: int, session: Session, toy: Toy, site: Path, mark: str
):
    """Status 75 within seconds, nothing left running; and only what came after the checkpoint is repeated."""
    name = ("gcs_server", "raylet")[seed % 2]
    words = ("cluster.cpus=1", "steps.checkpoint_every=2", "steps.seconds=0.5")
    driver = start(site, "run", "--config", toy.path, *words, mark=mark)
    try:
        until_step(toy, driver, 3)
        time.sleep(moment(seed, 2))
        began = time.monotonic()
        os.kill(process_of(mark, f"/{name}"), signal.SIGKILL)
        out, err = driver.communicate(timeout=60)
    finally:
        end(driver)
    assert driver.returncode == 75, out + err
    assert time.monotonic() - began < 30
    assert err.startswith(f"error: Ray's {name} died\n")
    assert "Traceback" not in out + err
    assert outliving(mark, 15) == []
    done = toy.done()

    toy.run(session, "steps.checkpoint_every=2")
    assert toy.done()[len(done)] >= len(done) - 2
    assert toy.total() == expected_total()


@pytest.mark.rounds(0, 10)
def test_a_lost_node_costs_a_restart_on_what_is_left(
    seed: int, toy: Toy, site: Path, mark: str, monkeypatch: pytest.MonkeyPatch
):
    """Of two nodes with a core each one dies. The other takes over from it, or of two ranks one goes on alone."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(MARK, mark)
    head: dict[str, Any] = LEAN | {"num_cpus": 0, "no_monitor": True}
    # Ray finds out before, or after, it tells that it does not reach the rank; by itself it takes 18 s.
    period, threshold = (500, 2) if seed % 2 == 0 else (1000, 4)
    checks = {"initial_delay_ms": 0, "period_ms": period, "failure_threshold": threshold}
    head["_system_config"] = {f"health_check_{name}": value for name, value in checks.items()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        nodes = [cluster.add_node(num_cpus=1, **LEAN) for _ in range(2)]
        count = ("auto", "1")[seed // 2 % 2]
        words = (f"cluster.address={cluster.address}", "steps.seconds=0.3", f"steps.workers.count={count}")
        driver = start(site, "run", "--config", toy.path, *words, mark=mark)
        try:
            until_step(toy, driver)
            time.sleep(moment(seed, 2))
            ranks = toy.ranks()
            assert len(ranks) == (2 if count == "auto" else 1)
            rank = ranks[-1]
            (lost,) = [node for node in nodes if node.node_id == rank.node]
            cluster.remove_node(lost, allow_graceful=False)
            out, err = driver.communicate(timeout=120)
        finally:
            end(driver)
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, out + err
    (told,) = [line for line in out.splitlines() if "starting again" in line]
    cause = f"rank {rank.rank} of steps was lost together with its node"
    assert cause in told or count == "auto", told + err  # the other rank may report first that its exchange failed
    assert ("steps: goes on with 1 rank(s) in place of 2" in out) == (count == "auto"), out
    assert "raylet" not in out + err
    assert toy.total() == expected_total()


@pytest.mark.rounds(0, 5)
def test_a_lost_head_that_had_the_rank_too_is_told_of(
    seed: int, toy: Toy, site: Path, mark: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the driver asks Ray about the rank's end waits for a minute, after which Ray would end the driver."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(MARK, mark)
    cluster = Cluster(initialize_head=True, head_node_args=LEAN | {"num_cpus": 1})
    driver = start(
        site, "run", "--config", toy.path, f"cluster.address={cluster.address}", "steps.seconds=0.4", mark=mark
    )
    try:
        until_step(toy, driver)
        time.sleep(moment(seed, 2))
        began = time.monotonic()
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        out, err = driver.communicate(timeout=90)
    finally:
        end(driver)
    assert driver.returncode == 75, out + err
    assert time.monotonic() - began < 45
    assert err.startswith("error: the head of the Ray cluster does not answer: ")
