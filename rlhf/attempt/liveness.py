"""Signs of life of a stage's ranks: where each runs, its last step, and its stacks when it makes no progress.

Each rank keeps two files in the attempt's folder: its pulse, which it rewrites whenever its work makes progress, and
its stacks, which Python's fault handler writes once that has not happened for most of the time that a group may hang.
No background thread writes the pulse: it would do so while the work hangs.
"""

import faulthandler
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from rlhf.attempt.folder import AttemptFolder, Pulse

STACK_AFTER = 0.8
"""The share of the time that a group may hang, after which a rank writes its stacks."""

LEAST_SECONDS = 1.0
"""Minimum interval between writes for progress smaller than a step: the folder may be on a network file system."""


class _PulseWriter:
    """Writes the pulse of this process, and arms the fault handler that writes its stacks."""

    def __init__(self, folder: AttemptFolder, pulse: Pulse, seconds: float, stack: IO[str]) -> None:
        self._folder, self._pulse, self._seconds, self._stack = folder, pulse, seconds, stack
        self._due = 0.0

    def beat(self, step: int | None) -> None:
        if step is None and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LEAST_SECONDS
        step = self._pulse.step if step is None else step
        self._pulse = replace(self._pulse, step=step, beat=self._pulse.beat + 1, at=time.time())
        self._folder.write_pulse(self._pulse)
        # Stacks of an earlier standstill are out of date once the work makes progress.
        self._stack.truncate(0)
        faulthandler.dump_traceback_later(STACK_AFTER * self._seconds, file=self._stack)


# At most one: a process is one rank, and Python's fault handler belongs to the whole process.
_writers: list[_PulseWriter] = []


@contextmanager
def beating(attempt: Path, rank: int, node: str, log: Path, seconds: float) -> Generator[None]:
    """Inside, this process is a rank of the attempt, and :func:`beat` writes its pulse.

    node     Ray's name of the node
    seconds  how long the rank may make no progress
    """
    folder = AttemptFolder(attempt)
    first = Pulse(rank, socket.gethostname(), node, os.getpid(), str(log), oom_kills(), None, 0, 0.0)
    with folder.stack(rank).open("a") as stack:
        writer = _PulseWriter(folder, first, seconds, stack)
        writer.beat(None)
        _writers.append(writer)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _writers.remove(writer)
    # Only the pulse of a rank that failed is needed.
    folder.remove_pulses(rank)


def beat(step: int | None = None) -> None:
    """Report progress; does nothing in a process that is no rank.

    step  the step that was finished; None for a part of one
    """
    for writer in _writers:
        with suppress(OSError):  # a full disk is reported where something that counts is written
            writer.beat(step)


def oom_kills() -> int:
    """Return the kernel's count of processes killed for memory, in this container where known, else on this machine."""
    for source in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError):
            for line in Path(source).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
