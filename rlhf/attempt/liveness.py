"""Signs of life of a stage's ranks: where each runs, its last step, and its stacks when it makes no progress.

Each rank keeps two files in the attempt's folder: its pulse, which it rewrites whenever its work makes progress, and
its stacks, which Python's fault handler writes once that has not happened for most of the time that a group may hang.
No background thread writes the pulse: it would do so while the work hangs.
"""

import faulthandler
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rlhf.attempt.folder import Pulse, RankFiles

STACK_AFTER = 0.8
"""The share of the time that a group may hang, after which a rank writes its stacks."""

LEAST_SECONDS = 1.0
"""Minimum interval between writes for progress smaller than a step: the folder may be on a network file system."""


# At most one: a process is one rank, and Python's fault handler belongs to the whole process.
_writers: list[Callable[[int | None], None]] = []


@contextmanager
def beating(attempt: Path, rank: int, node: str, log: Path, seconds: float) -> Generator[None]:
    """Inside, this process is a rank of the attempt, and :func:`beat` writes its pulse.

    node     Ray's name of the node
    seconds  how long the rank may make no progress
    """
    files, due = RankFiles(attempt, rank), 0.0
    pulse = Pulse(rank, socket.gethostname(), node, os.getpid(), str(log), oom_kills(), None, 0, 0.0)
    with files.stack.open("a") as stack:

        def write(step: int | None) -> None:
            nonlocal pulse, due
            if step is None and time.monotonic() < due:
                return
            due = time.monotonic() + LEAST_SECONDS
            pulse = replace(pulse, step=pulse.step if step is None else step, beat=pulse.beat + 1, at=time.time())
            files.pulse.write(pulse)
            stack.truncate(0)  # stacks of an earlier standstill are out of date
            faulthandler.dump_traceback_later(STACK_AFTER * seconds, file=stack)

        write(None)
        _writers.append(write)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _writers.remove(write)
    files.remove_signs_of_life()  # only those of a rank that failed are needed


def beat(step: int | None = None) -> None:
    """Report progress; does nothing in a process that is no rank.

    step  the step that was finished; None for a part of one
    """
    for write in _writers:
        with suppress(OSError):  # a full disk is reported where something that counts is written
            write(step)


def oom_kills() -> int:
    """Return the kernel's count of processes killed for memory, in this container where known, else on this machine."""
    for source in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError):
            for line in Path(source).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
