"""Signs of life: who a stage's ranks are, how far each is, and where it stands when it gets no further.

Each rank keeps two files in the attempt: ``pulse-<k>.json``, written anew whenever its work gets on, and
``stack-<k>.trace``, into which the interpreter writes what every thread is doing once that has not happened for most of
the time that a group may stand still. No thread beats in the background: it would go on while the work hangs.
"""

import faulthandler
import json
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

STACK_AFTER = 0.8
"""The share of the time that a group may stand still, after which a rank writes its stacks."""

LEAST_SECONDS = 1.0
"""What is less than a step is written no more often: the folder may lie on a network's file system."""


@dataclass(frozen=True)
class Pulse:
    """One rank, as it was when its work last got on."""

    rank: int
    host: str
    node: str
    """Ray's name of its node."""
    pid: int
    log: str
    oom_kills: int
    """What the operating system counted of processes killed for memory when the rank began."""
    step: int | None
    """The last step that was finished; None before the first."""
    beat: int
    at: float
    """Seconds since 1970 by the rank's clock."""

    def is_here(self) -> bool:
        """Whether the rank's process runs on this host."""
        if self.host != socket.gethostname():
            return False
        with suppress(OSError):
            # Ray names its workers so: another process may have the number by now.
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().startswith(b"ray::")
        return False

    def __str__(self) -> str:
        """Rank, host, process, step and log, for a message."""
        step = "before its first step" if self.step is None else f"last step {self.step}"
        return f"rank {self.rank} on {self.host} (pid {self.pid}), {step}; log: {self.log}"


class _Heart:
    """This process's pulse, and the file for its stacks."""

    def __init__(self, path: Path, pulse: Pulse, seconds: float, stack: IO[str]) -> None:
        self._path, self._pulse, self._seconds, self._stack = path, pulse, seconds, stack
        self._due = 0.0

    def beat(self, step: int | None) -> None:
        before = self._pulse
        if step is None and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + LEAST_SECONDS
        step = before.step if step is None else step
        self._pulse = replace(before, step=step, beat=before.beat + 1, at=time.time())
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self._pulse)))
        temporary.replace(self._path)
        # What an earlier standstill left is no news once the work got on.
        self._stack.truncate(0)
        faulthandler.dump_traceback_later(STACK_AFTER * self._seconds, file=self._stack)


# At most one: a process is one rank, and Python's fault handler belongs to the whole process.
_hearts: list[_Heart] = []


@contextmanager
def beating(attempt: Path, rank: int, node: str, log: Path, seconds: float) -> Generator[None]:
    """Inside, this process is a rank of the attempt, and :func:`beat` writes its pulse.

    node     Ray's name of the node
    seconds  how long the rank may stand still
    """
    first = Pulse(rank, socket.gethostname(), node, os.getpid(), str(log), oom_kills(), None, 0, 0.0)
    with stack_path(attempt, rank).open("a") as stack:
        heart = _Heart(pulse_path(attempt, rank), first, seconds, stack)
        heart.beat(None)
        _hearts.append(heart)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _hearts.remove(heart)
    # Only of a rank that failed is there anything to tell.
    forget(attempt, rank)


def beat(step: int | None = None) -> None:
    """Say that the work got on; does nothing in a process that is no rank.

    step  the step that was finished, where it is one
    """
    for heart in _hearts:
        with suppress(OSError):  # a full disk is told of where something that counts is written
            heart.beat(step)


def pulses(attempt: Path) -> dict[int, Pulse]:
    """The ranks that have begun, by rank."""
    found: dict[int, Pulse] = {}
    for path in attempt.glob("pulse-*.json"):
        with suppress(OSError, ValueError, TypeError):
            pulse = Pulse(**json.loads(path.read_text()))
            found[pulse.rank] = pulse
    return dict(sorted(found.items()))


def stack_of(attempt: Path, rank: int) -> str:
    """What a rank's threads were doing when it had stood still for long; empty where it could not tell or got on."""
    try:
        return stack_path(attempt, rank).read_text(errors="replace")
    except OSError:
        return ""


def forget(attempt: Path, rank: int | None = None) -> None:
    """Remove what a rank, or where none is named each of an earlier group's, left."""
    which = "*" if rank is None else rank
    for pattern in (f"pulse-{which}.json", f"stack-{which}.trace"):
        for path in attempt.glob(pattern):
            path.unlink(missing_ok=True)


def pulse_path(attempt: Path, rank: int) -> Path:
    """Where a rank's pulse is."""
    return attempt / f"pulse-{rank}.json"


def stack_path(attempt: Path, rank: int) -> Path:
    """Where a rank's stacks are."""
    return attempt / f"stack-{rank}.trace"


def oom_kills() -> int:
    """How many processes the kernel has killed for memory, in this container where it tells, else on this machine."""
    for source in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError):
            for line in Path(source).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
