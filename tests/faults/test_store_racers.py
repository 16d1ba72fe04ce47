"""Several processes at one key: the lease saves work, and the commit decides."""

import signal
from pathlib import Path

import pytest

from rlhf.store import Store
from tests.faults.processes import child, finish, hear, say
from tests.store.helpers import KEY, files_under, small_payload


@pytest.mark.parametrize("racers", [2, 4, 16])
@pytest.mark.rounds(2, 50)
def test_of_racers_one_trains_and_the_others_wait_and_adopt(quick: Path, racers: int, seed: int):
    """One commit; whoever waits says for whom, by process and host."""
    told = finish(child("race", quick, str(racers), str(seed)))
    assert len(told) == racers
    (winner,) = (one for one in told if one["trained"])
    assert {one["adopted"] for one in told} == {winner["name"]}
    store = Store.open(quick)
    record = store.lookup(KEY)
    assert record is not None
    assert record.attempt == winner["name"]
    assert len(files_under(quick / "actions")) == len(files_under(quick / "manifests")) == 1
    assert len(store.attempts(KEY)) == 1
    for one in told:
        expected = [] if one["trained"] else [f"Waiting for process {winner['pid']} of "]
        assert [line[: len(expected[0])] for line in one["told"]] == expected
    assert files_under(quick / "leases") == {}
    assert store.verify().damaged == []


@pytest.mark.parametrize("first", ["stopped", "successor"])
@pytest.mark.rounds(1, 20)
def test_a_holder_stopped_past_its_lease_and_continued_adopts_or_is_adopted(quick: Path, first: str, seed: int):
    """Whoever creates the action record first is the result, whole; the other adopts it."""
    stopped = child("work", quick, "stopped")
    successor = None
    try:
        assert hear(stopped)["ready"]
        stopped.send_signal(signal.SIGSTOP)
        successor = child("work", quick, "successor")
        assert hear(successor)["ready"], "a silent holder's lease was not taken over"
        if first == "successor":
            (told,) = finish(successor)
            assert told["told"][0].startswith("Waiting for process ")
            stopped.send_signal(signal.SIGCONT)
            assert finish(stopped)[0]["adopted"] == "successor"
        else:
            stopped.send_signal(signal.SIGCONT)
            assert finish(stopped)[0]["adopted"] == "stopped"
            assert finish(successor)[0]["adopted"] == "stopped"
    finally:
        for process in (stopped, successor):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate()
    store = Store.open(quick)
    record = store.lookup(KEY)
    assert record is not None
    assert record.attempt == first
    assert files_under(store.checkout(record.artifact, quick / "out")) == small_payload(first)
    assert len(store.keys()) == 1
    assert store.verify().damaged == []
    assert files_under(quick / "leases") == {}


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.rounds(1, 5)
def test_a_clock_an_hour_off_takes_nobodys_lease(quick: Path, hours: int, seed: int):
    """Life is told by a counter that moves, watched by a clock that cannot be set."""
    holder = child("work", quick, "holder")
    try:
        assert hear(holder)["ready"]
        (told,) = finish(child("watch", quick, str(hours)))
        assert told["taken"] is False
        assert str(holder.pid) in told["what"]
        say(holder)
        assert hear(holder)["adopted"] == "holder"
    finally:
        holder.kill()
        holder.communicate()
