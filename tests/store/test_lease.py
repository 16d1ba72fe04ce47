import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from rlhf.errors import LeaseHeldError
from rlhf.store import LEASE_SECONDS, Holder, Store
from rlhf.store.lease import POLL_SECONDS, REPORT_SECONDS
from tests.pipeline.helpers import until
from tests.store.helpers import KEY, child, finish, hear, say
from tests.store.places import Place


@contextmanager
def holding_child(uri: str, beat_seconds: float) -> Generator["subprocess.Popen[str]", None, None]:
    """A process that holds the lease; killed at the end if it still runs."""
    process = child("hold", uri, str(beat_seconds))
    try:
        assert hear(process) == "ready"
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclass
class Clock:
    """The clock of whoever waits in this process. Sleeping alone moves it, so that no load of the machine does."""

    now: float = 0.0
    during_sleep: Callable[[], object] = int

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("rlhf.store.lease.time", clock)
    monkeypatch.setattr("rlhf.store.lease.BEAT_SECONDS", 3600)  # so that this process's own counter stays
    return clock


def until_it_beats(store: Store) -> None:
    """Wait until the holder has moved its counter."""
    before = store.holder(KEY)
    until(lambda: store.holder(KEY) != before, "a beat")


def test_a_held_lease_names_its_holder_and_is_free_afterwards(place: Place):
    """Whoever comes second learns who works on the key: host, process, and since when."""
    store = place.open()
    with store.lease(KEY) as mine:
        with pytest.raises(LeaseHeldError) as caught, place.open().lease(KEY):
            pass
        for fact in (mine.host, str(os.getpid()), mine.since, mine.user):
            assert fact in caught.value.what
        assert store.holder(KEY) == mine
    assert store.holder(KEY) is None
    with store.lease(KEY):
        pass
    assert place.files("leases") == {}


def test_a_body_that_fails_releases_the_lease_and_its_error_comes_through(place: Place):
    """A failed stage blocks nobody, and its own error is what is seen."""
    store = place.open()
    with pytest.raises(ZeroDivisionError), store.lease(KEY):
        raise ZeroDivisionError
    assert store.holder(KEY) is None


@pytest.mark.parametrize("reaped", [True, False])
def test_a_dead_holder_on_this_machine_is_succeeded_at_once(place: Place, reaped: bool):
    """kill -9 of a driver costs no waiting, even while its parent has not yet taken note of its death."""
    store = place.open()
    with holding_child(place.uri, 5) as process:
        holder = store.holder(KEY)
        assert holder is not None
        assert holder.pid == process.pid
        process.kill()
        if reaped:
            process.wait()
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert store.holder(KEY) is None
        with store.lease(KEY, timeout=0) as mine:
            assert mine.pid == os.getpid()


def test_a_reused_process_id_is_not_mistaken_for_the_holder(place: Place):
    """A live process that started at another time than the lease says is another process."""
    store = place.open()
    with store.lease(KEY) as mine:
        pass
    place.write(f"leases/{KEY}", dataclasses.replace(mine, started="1").to_json())
    with store.lease(KEY, timeout=0):
        pass


def test_a_live_holder_keeps_its_lease_however_long_one_waits(place: Place, clock: Clock):
    """Its counter moves, so it never goes stale; the waiter is told whom it waits for, and gives up in its own time."""
    store, told = place.open(), list[str]()
    with holding_child(place.uri, 0.05) as process:
        seen_at = 0.0

        def beat_at_the_last_moment() -> None:
            nonlocal seen_at
            if clock.now - seen_at >= LEASE_SECONDS - 2 * POLL_SECONDS:
                until_it_beats(store)
                seen_at = clock.now

        clock.during_sleep = beat_at_the_last_moment
        with pytest.raises(LeaseHeldError), store.lease(KEY, timeout=3 * LEASE_SECONDS, on_wait=told.append):
            pass
        assert clock.now == 3 * LEASE_SECONDS
        assert len(told) == 1 + 3 * LEASE_SECONDS // REPORT_SECONDS
        assert all(str(process.pid) in line for line in told)
        finish(process)
    assert store.holder(KEY) is None


def test_a_waiter_without_a_timeout_gets_the_lease_when_it_is_released(place: Place, clock: Clock):
    """Waiting for ever ends as soon as the holder is done."""
    store = place.open()
    with holding_child(place.uri, 0.1) as process:

        def release() -> None:
            if clock.now == 4 * POLL_SECONDS:
                say(process)
                until(lambda: store.holder(KEY) is None, "the release")

        clock.during_sleep = release
        with store.lease(KEY, timeout=None) as mine:
            assert mine.pid == os.getpid()
        assert clock.now == 4 * POLL_SECONDS


def test_a_stopped_holder_is_succeeded_and_does_not_disturb_its_successor(place: Place, clock: Clock):
    """A counter that stands still loses the lease; the old holder, awake again, leaves the new one alone."""
    store = place.open()
    with holding_child(place.uri, 0.5) as process:
        until_it_beats(store)  # so that it is not stopped in the middle of a beat
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with store.lease(KEY, timeout=None) as mine:
            assert LEASE_SECONDS <= clock.now <= LEASE_SECONDS + 2 * POLL_SECONDS
            process.send_signal(signal.SIGCONT)
            assert hear(process) == "lost"
            assert store.holder(KEY) == mine
            finish(process)
            assert store.holder(KEY) == mine


@pytest.mark.parametrize("readable", [True, False])
def test_a_holder_elsewhere_is_judged_by_its_counter_alone(place: Place, clock: Clock, readable: bool):
    """Neither its clock nor its process id means anything here; nor need its lease be readable."""
    store = place.open()
    far = Holder("far", "another machine", os.getpid(), "1", "ada", "2000-01-01 00:00:00 UTC", "token", 0)
    place.write(f"leases/{KEY}", far.to_json() if readable else b"torn")
    with pytest.raises(LeaseHeldError, match="far" if readable else "unreadable"), store.lease(KEY):
        pass
    with store.lease(KEY, timeout=2 * LEASE_SECONDS):
        assert LEASE_SECONDS <= clock.now <= LEASE_SECONDS + 2 * POLL_SECONDS


def test_the_counter_moves_while_the_lease_is_held(place: Place, monkeypatch: pytest.MonkeyPatch):
    """Others see life without asking the holder."""
    monkeypatch.setattr("rlhf.store.lease.BEAT_SECONDS", 0.02)
    store, counts = place.open(), set[int]()
    with store.lease(KEY):
        end = time.monotonic() + 60
        while len(counts) < 3 and time.monotonic() < end:
            holder = store.holder(KEY)
            counts.add(holder.count if holder is not None else -1)
    assert len(counts) >= 3
    assert -1 not in counts


def test_leases_of_different_keys_are_independent(place: Place):
    """Two stages of one pipeline may run at the same time."""
    store = place.open()
    with ExitStack() as stack:
        for n in range(3):
            stack.enter_context(store.lease(f"{n}" * 64))
        assert len(place.files("leases")) == 3
