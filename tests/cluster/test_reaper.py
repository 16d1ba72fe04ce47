import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest

from rlhf.cluster import reaper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no other system shows environments as files")


@contextmanager
def sleeping(mark: str) -> Generator["subprocess.Popen[bytes]"]:
    """A process with a mark, which would go on for a minute."""
    process = subprocess.Popen(["sleep", "60"], env=os.environ | {reaper.MARK: mark})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ended_within(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_whatever_has_the_mark_ends_soon_after_its_driver_and_nothing_else_does():
    """What begins in the last moment too; and the program itself ends."""
    with ExitStack() as stack:
        program = reaper.start("mine")
        stack.callback(program.kill)
        mine, other = stack.enter_context(sleeping("mine")), stack.enter_context(sleeping("other"))
        assert not ended_within(mine, 1.5 * reaper.GRACE_SECONDS)
        assert program.stdin is not None
        program.stdin.close()  # as the kernel does for a driver that was killed
        time.sleep(reaper.GRACE_SECONDS / 2)
        late = stack.enter_context(sleeping("mine"))
        assert ended_within(mine, 5)
        assert ended_within(late, 5)
        assert ended_within(program, 5)
        assert other.poll() is None
