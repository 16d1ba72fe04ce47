from pathlib import Path

import pytest

from rlhf.attempt.context import Context
from rlhf.attempt.folder import Pulse
from rlhf.cluster import worker_group
from rlhf.cluster.worker import Call
from rlhf.cluster.worker_group import Watchdog
from rlhf.errors import HangError, TryAgainError
from tests.pipeline.toys import TotalSettings

WAITS = (
    '  File "/lib/torch/distributed/distributed_c10d.py", line 7 in all_reduce\n'
    '  File "/x/rlhf/zero/group.py", line 9 in all_sum\n'
)
COMPUTES = '  File "/lib/numpy/core.py", line 1 in dot\n  File "/x/stages/ppo.py", line 61 in run\n'
MINUTES = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker_group, "time", clock)
    return clock


@pytest.fixture
def call(tmp_path: Path) -> Call:
    context = Context("total", "key", TotalSettings(), {}, tmp_path / "output", tmp_path, tmp_path)
    return Call("tests.pipeline.toys:total", context, timeout_minutes=MINUTES)


def beats(call: Call, rank: int, beat: int, stack: str = "") -> None:
    files = call.context.folder.rank(rank)
    pulse = Pulse(rank, "node", "", 40 + rank, f"log-{rank}.txt", 0, beat, beat, float(beat))
    files.pulse.write(pulse)
    files.stack.write_text(stack)


def hang(call: Call, clock: Clock, watch: Watchdog) -> HangError:
    """Let the deadline pass."""
    clock.now += 2
    watch()
    clock.now += 60 * MINUTES - 1
    watch()
    clock.now += 2
    with pytest.raises(HangError) as caught:
        watch()
    return caught.value


def test_a_rank_that_gets_on_puts_the_deadline_off(call: Call, clock: Clock):
    """However long the whole takes, and whichever rank it is."""
    watch = Watchdog(call, 2)
    for beat in range(10):
        beats(call, beat % 2, beat)
        clock.now += 60 * MINUTES - 5
        watch()


def test_the_rank_that_computes_is_named_and_not_those_that_wait_for_it(call: Call, clock: Clock):
    """With the place in our code, and what a user needs to look further."""
    watch = Watchdog(call, 3)
    beats(call, 0, 5, WAITS)
    beats(call, 1, 5, COMPUTES)
    beats(call, 2, 5, WAITS)
    error = hang(call, clock, watch)
    assert error.what == "rank 1 of total stood still for 30 minutes in stages/ppo.py:61 (run)"
    assert error.where == "rank 1 on node (pid 41), last step 5; log: log-1.txt"


def test_a_rank_that_waits_for_those_set_apart_is_not_named(call: Call, clock: Clock):
    """It waits outside of torch.distributed's own code."""
    watch = Watchdog(call, 2)
    beats(
        call,
        0,
        5,
        '  File "/x/rlhf/zero/apart.py", line 60 in receive\n  File "/x/stages/ppo.py", line 80 in iterate\n',
    )
    beats(call, 1, 5, COMPUTES)
    assert hang(call, clock, watch).what.startswith("rank 1 of total stood still")


def test_a_process_that_could_not_even_tell_where_it_stands_is_stopped(call: Call, clock: Clock):
    """The interpreter writes the stacks by itself, unless the whole process does not run."""
    watch = Watchdog(call, 2)
    beats(call, 0, 5)
    beats(call, 1, 5, COMPUTES)
    assert hang(call, clock, watch).what == "rank 0 of total stood still for 30 minutes: its process is stopped"


def test_where_all_wait_those_that_got_least_far_are_named(call: Call, clock: Clock):
    """A collective that one rank does not reach and another is not part of."""
    watch = Watchdog(call, 3)
    for rank, beat in enumerate((5, 4, 4)):
        beats(call, rank, beat, WAITS)
    assert hang(call, clock, watch).what.startswith("ranks 1, 2 of total stood still")


def test_a_rank_that_never_began_is_named(call: Call, clock: Clock):
    """Its peers wait for it at the rendezvous."""
    watch = Watchdog(call, 2)
    beats(call, 0, 1, WAITS)
    assert hang(call, clock, watch).what == "rank 1 of total did not begin within 30 minutes"


def test_a_rank_that_is_done_is_not_missed(call: Call, clock: Clock):
    """Who stands still is the one that is still there."""
    watch = Watchdog(call, 2)
    beats(call, 0, 5, COMPUTES)
    beats(call, 1, 5)
    clock.now += 2
    watch()
    call.context.folder.rank(1).remove_signs_of_life()
    assert hang(call, clock, watch).what.startswith("rank 0 of total stood still")


def test_a_stage_that_finds_no_room_is_a_reason_to_try_again(call: Call, clock: Clock):
    """Ray itself would wait for ever."""
    watch = Watchdog(call, 2)
    clock.now += 60 * worker_group.START_MINUTES - 1
    watch()
    clock.now += 2
    with pytest.raises(TryAgainError, match="no process of total began within 60 minutes"):
        watch()
