"""Ranks that are killed, and that stand still."""

import os
import signal
import threading

import pytest

from rlhf.attempt.folder import newest_complete, step_of
from rlhf.cluster.session import Session
from rlhf.errors import OutOfMemoryError
from tests.faults.running import Toy, expected_total, signalled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets of dead actors to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TWO = "steps.workers.count=2"


@pytest.mark.rounds(0, 2)
def test_a_rank_that_stands_still_is_named_and_its_group_starts_again(session: Session, toy: Toy, seed: int):
    """One process of two is stopped and the other waits for it: after the deadline it goes on with two new ones."""
    with signalled(toy, rank=seed, number=signal.SIGSTOP) as hit:
        toy.run(session, TWO, "steps.workers.timeout_minutes=0.2", "steps.seconds=0.2")
    (line,) = [line for line in toy.output.getvalue().splitlines() if "starting again" in line]
    assert line.startswith(f"steps: rank {seed} of steps stood still for 0.2 minutes: its process is stopped")
    assert f"rank {seed} on {hit[0].host} (pid {hit[0].pid}), last step {hit[0].step}; log: " in line
    assert toy.total() == expected_total()


@pytest.mark.rounds(0, 3)
def test_a_rank_killed_after_every_checkpoint_costs_no_more_than_restarts(session: Session, toy: Toy, seed: int):
    """More often than a group may fail at one place: each time it has come further, and goes on."""
    killed: set[int] = set()
    over = threading.Event()

    def kill() -> None:
        while not over.wait(0.02):
            checkpoint, rank = newest_complete(toy.attempts()), toy.rank(seed % 2)
            if checkpoint is None or rank is None or step_of(checkpoint) in killed:
                continue
            if rank.is_here() and (rank.step or 0) >= step_of(checkpoint):
                os.kill(rank.pid, signal.SIGKILL)
                killed.add(step_of(checkpoint))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        toy.run(session, TWO, "steps.checkpoint_every=3", "steps.seconds=0.5", "cluster.max_failures=1")
    finally:
        over.set()
        thread.join()
    assert toy.output.getvalue().count("starting again from the newest checkpoint (1 of 1)") >= 3
    assert toy.total() == expected_total()


@pytest.mark.rounds(1, 2)
def test_out_of_memory_is_tried_once_more_and_then_says_what_to_lower(session: Session, toy: Toy, seed: int):
    """With half the micro batch, where the ranks chose it: what is too large stays so."""
    with pytest.raises(OutOfMemoryError) as caught:
        toy.run(session, "steps.behaviour=allocates", "cluster.max_failures=3", f"steps.workers.count={1 + seed}")
    assert toy.output.getvalue().count("starting again") == 1
    assert "(1 of 3), with micro_batch_size 2;" in toy.output.getvalue()
    assert caught.value.what == "steps ran out of memory: MemoryError"
    assert "steps.micro_batch_size=1" in caught.value.next_step
    assert f"rank {seed} on " in caught.value.where
