"""The ends of ranks on other hosts."""

import os
import socket
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf.attempt.folder import AttemptFolder, Pulse
from rlhf.cluster import ending
from rlhf.cluster.ending import end_everywhere
from rlhf.cluster.session import Session
from tests.faults.running import gone
from tests.pipeline.helpers import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@contextmanager
def rank(attempt: Path, node: str, host: str) -> "Generator[subprocess.Popen[bytes]]":
    """A process that has a rank's name and pulse."""
    process = subprocess.Popen(["bash", "-c", "exec -a ray::Rank.run sleep 60"])
    until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(b"ray::"), "its name")
    pulse = Pulse(0, host, node, process.pid, "log", 0, 3, 1, 0.0)
    AttemptFolder(attempt).rank(0).pulse.write(pulse)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_rank_of_another_host_is_ended_there_before_anything_goes_on(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stopped one too, which would go on writing if somebody let it; a node that is lost has no ranks."""
    import ray

    node, host = ray.nodes()[0]["NodeID"], socket.gethostname()
    with monkeypatch.context() as here:  # this process counts as another host than Ray's
        here.setattr(socket, "gethostname", lambda: "the driver's host")
        with rank(tmp_path, node, host) as process:
            os.kill(process.pid, 19)
            assert end_everywhere(tmp_path) == []
            assert gone(process.pid)
        with rank(tmp_path, "a lost node", host) as process:
            assert end_everywhere(tmp_path) == []
            assert not gone(process.pid)


def test_a_rank_that_does_not_end_is_told_of(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As one that waits for a file system that is gone, which no signal ends."""
    with rank(tmp_path, "", socket.gethostname()) as process:
        with monkeypatch.context() as here:
            here.setattr(ending, "END_SECONDS", 0.2)
            here.setattr(os, "kill", lambda pid, number: None)
            (left,) = end_everywhere(tmp_path)
        assert left.pid == process.pid
